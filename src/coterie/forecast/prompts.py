"""Statistical prompts: a segment's time and statistics as text, read by a frozen language model.

A prompt is written for every segment of P steps from that segment alone, so that one of predicted steps is
written from the predictions. The vectors of a series' own segments are kept on disk where asked.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coterie.data import written_whole
from coterie.forecast.backbone import Backbone

Prompt = Literal["stats", "time", "none"]
Pool = Literal["last", "mean"]
Times = npt.NDArray[np.datetime64]

_BATCH = 512  # prompts in one pass


class CacheMismatchError(ValueError):
    """Prompt vectors of another backbone, or of another width than the one that is to read them."""


def statistics(segments_BP: Tensor) -> Tensor:
    """[B, 3]: mean, standard deviation, and last minus first value of each segment.

    >>> statistics(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
    [[2.0, 0.8164966106414795, 2.0]]
    """
    mean_B, deviation_B = segments_BP.mean(1), segments_BP.std(1, correction=0)
    return torch.stack([mean_B, deviation_B, segments_BP[:, -1] - segments_BP[:, 0]], 1)


def write_prompts(statistics_B3: Tensor | None, times_B2: Times | None) -> list[str]:
    """The text of each segment; a line for the time and one for each statistic, of what is given.

    Args:
        statistics_B3: of `statistics`; four decimals are written.
        times_B2: first and last time of each segment, datetime64[s].

    >>> print(write_prompts(torch.tensor([[0.5, 1.25, -2.0]]), None)[0])
    Its mean is 0.5000.
    Its standard deviation is 1.2500.
    Its change from first to last is -2.0000.
    >>> write_prompts(None, np.array([["2016-07-01T00:00:00", "2016-07-01T23:00:00"]], "datetime64[s]"))
    ['The time series runs from 2016-07-01 00:00:00 to 2016-07-01 23:00:00.']
    """
    lines: list[list[str]] = []
    if times_B2 is not None:
        written = np.char.replace(np.datetime_as_string(times_B2.astype("datetime64[s]")), "T", " ")
        lines.append([f"The time series runs from {first} to {last}." for first, last in written])
    if statistics_B3 is not None:
        lines.append(
            [
                f"Its mean is {mean:.4f}.\nIts standard deviation is {deviation:.4f}.\n"
                f"Its change from first to last is {change:.4f}."
                for mean, deviation, change in statistics_B3.tolist()
            ]
        )
    return ["\n".join(each) for each in zip(*lines, strict=True)]


class PromptEncoder:
    """Segments to prompt vectors: text, frozen language model, one vector of its last hidden states.

    Args:
        backbone: the language model.
        prompt: "stats" for time and statistics, "time" for the time alone.
        pool: "last" for the state of the last token that is no padding, as in the paper; "mean" for the mean
            over tokens, which suits the tiny backbone.
        cache: folder for what `series` computes; None keeps nothing.

    Raises (on call) ValueError: prompt="time" for segments without times.

    >>> from coterie.forecast.backbone import tiny_backbone
    >>> PromptEncoder(tiny_backbone(steps=1))(torch.randn(5, 24)).shape
    torch.Size([5, 64])
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        prompt: Literal["stats", "time"] = "stats",
        pool: Pool = "mean",
        cache: str | Path | None = None,
    ) -> None:
        self.backbone, self.prompt, self.pool = backbone, prompt, pool
        self.cache = None if cache is None else Path(cache)

    @torch.no_grad()
    def __call__(self, segments_BP: Tensor, times_B2: Times | None = None) -> Tensor:
        """[B, D] of segments [B, P] and their first and last times [B, 2], if they have any."""
        if self.prompt == "time" and times_B2 is None:
            raise ValueError(
                'prompt="time" but the series has no times; name its time column, or use "stats"'
            )
        texts = write_prompts(statistics(segments_BP) if self.prompt == "stats" else None, times_B2)
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # channels share times
        distinct = list(place)
        vectors = [self._vectors(distinct[i : i + _BATCH]) for i in range(0, len(distinct), _BATCH)]
        return torch.cat(vectors)[[place[text] for text in texts]]

    def series(
        self,
        values_T: Tensor,
        starts_S: Tensor,
        token_len: int,
        times_T: Times | None = None,
        *,
        name: str = "",
    ) -> Tensor:
        """[S, D] of the segments of one series, from the cache if it has them.

        The cache's key is made of the values and times themselves, the series' name, the starts, the length
        of a segment, how prompts are written and pooled, and the backbone's digest.

        Args:
            values_T: the series.
            starts_S: where segments begin.
            token_len: P, their length.
            times_T: of the values.
            name: of the series.

        Raises ValueError: a segment that ends after the series; CacheMismatchError: a file of the cache that
        does not hold what its name says.
        """
        if len(starts_S) and int(starts_S.max()) + token_len > len(values_T):
            raise ValueError(
                f"the segment from step {int(starts_S.max())} of {token_len} steps ends after the series, "
                f"which has {len(values_T)}"
            )

        def compute() -> Tensor:
            times_S2 = None
            if times_T is not None:
                times_S2 = np.stack([times_T[starts_S.numpy()], times_T[starts_S.numpy() + token_len - 1]], 1)
            return self(values_T.unfold(0, token_len, 1)[starts_S], times_S2)

        if self.cache is None:
            return compute()
        parts = [name, str(token_len), self.prompt, self.pool, self.backbone.digest]
        digest = hashlib.sha256(json.dumps(parts).encode())
        digest.update(values_T.numpy().tobytes() + starts_S.numpy().tobytes())
        digest.update(b"" if times_T is None else times_T.astype("datetime64[s]").tobytes())
        return self._kept(self.cache / f"{digest.hexdigest()[:32]}.safetensors", len(starts_S), compute)

    def _kept(self, file: Path, rows: int, compute: Callable[[], Tensor]) -> Tensor:
        prompts_SD: Tensor
        if not file.is_file():
            described = {"backbone": self.backbone.name, "digest": self.backbone.digest}
            prompts_SD = compute()
            with written_whole(file) as draft:
                save_file({"prompts": prompts_SD.contiguous()}, draft, metadata=described)
        with safe_open(file, "pt") as opened:  # memory-mapped: read when used
            described, prompts_SD = opened.metadata() or {}, opened.get_tensor("prompts")
        if described.get("digest") != self.backbone.digest or prompts_SD.shape != (rows, self.backbone.dim):
            raise CacheMismatchError(
                f"{file} holds prompts {list(prompts_SD.shape)} of backbone {described.get('backbone')!r}; "
                f"should be {[rows, self.backbone.dim]} of {self.backbone.name!r}. Delete it, or give "
                "another cache folder"
            )
        return prompts_SD

    def _vectors(self, texts: list[str]) -> Tensor:
        states_BSD, mask_BS = self.backbone.states(texts)
        if self.pool == "last":
            return states_BSD[torch.arange(len(texts)), mask_BS.sum(1) - 1]
        shown_BS1 = mask_BS.unsqueeze(2).to(states_BSD.dtype)
        return (states_BSD * shown_BS1).sum(1) / shown_BS1.sum(1)
