"""Windows of many series, and the prompts of their patches."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coterie.forecast.prompts import PromptEncoder, Times


class Windows:
    """Every window of every series as one row, series by series.

    Args:
        values_CT: C series.
        starts_W: where windows begin, the same in each series.
        seq_len: L.
        token_len: P.
        encoder: writes prompts; None for windows without.
        names: of the series, for the cache.
        times_T: of the values, and on into the future as far as patches are predicted; None for none.

    Attributes: `count`, the rows, C · W.

    >>> windows = Windows(torch.arange(20.0).view(2, 10), torch.tensor([0, 3]), seq_len=4, token_len=2)
    >>> windows.count, windows.steps(torch.tensor([1, 2]), 0, 4).tolist()
    (4, [[3.0, 4.0, 5.0, 6.0], [10.0, 11.0, 12.0, 13.0]])
    """

    def __init__(
        self,
        values_CT: Tensor,
        starts_W: Tensor,
        *,
        seq_len: int,
        token_len: int,
        encoder: PromptEncoder | None = None,
        names: Sequence[str] = (),
        times_T: Times | None = None,
    ) -> None:
        self.values_CT, self.starts_W, self.count = values_CT, starts_W, len(values_CT) * len(starts_W)
        self.seq_len, self.token_len, self.encoder, self.times_T = seq_len, token_len, encoder, times_T
        self._patches_N = torch.arange(0, seq_len, token_len)
        if encoder is not None:
            self._starts_S = torch.unique(starts_W.unsqueeze(1) + self._patches_N)
            known = None if times_T is None else times_T[: values_CT.shape[1]]
            self._prompts = [
                encoder.series(values_T, self._starts_S, token_len, known, name=name)
                for values_T, name in zip(values_CT, names, strict=True)
            ]

    def steps(self, rows_B: Tensor, offset: int, length: int) -> Tensor:
        """[B, length]: values of some windows from `offset` steps after their begin."""
        series_B, starts_B = self._place(rows_B)
        return self.values_CT[series_B.unsqueeze(1), starts_B.unsqueeze(1) + offset + torch.arange(length)]

    def samples(self, rows_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Some windows [B, L], what follows each of their steps by P [B, L], and their prompts."""
        target_BL = self.steps(rows_B, self.token_len, self.seq_len)
        return self.steps(rows_B, 0, self.seq_len), target_BL, self.prompts(rows_B)

    def prompts(self, rows_B: Tensor) -> Tensor | None:
        """[B, L/P, D]: the prompts of some windows' patches; None without."""
        if self.encoder is None:
            return None
        series_B, starts_B = self._place(rows_B)
        place_BN = torch.searchsorted(self._starts_S, starts_B.unsqueeze(1) + self._patches_N)
        prompts_BND = self._prompts[0].new_empty(*place_BN.shape, self._prompts[0].shape[1])
        for series in set(series_B.tolist()):  # not stacked: each may be memory-mapped
            chosen_B = series_B == series
            prompts_BND[chosen_B] = self._prompts[series][place_BN[chosen_B]]
        return prompts_BND

    def prompt(self, rows_B: Tensor, patches_BP: Tensor, offset: int) -> Tensor:
        """[B, D]: the prompts of given patches, `offset` steps after the begin of some windows."""
        assert self.encoder is not None, "these windows have no prompts"
        if self.times_T is None:
            return self.encoder(patches_BP)
        first_B = (self._place(rows_B)[1] + offset).numpy()
        times_B2 = np.stack([self.times_T[first_B], self.times_T[first_B + self.token_len - 1]], 1)
        return self.encoder(patches_BP, times_B2)

    def _place(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        return rows_B // len(self.starts_W), self.starts_W[rows_B % len(self.starts_W)]


def spread_starts(count: int, stride: int, token_len: int) -> Tensor:
    """About every `stride`-th of `count` places, at as many hours of the day as can be.

    Places at multiples of 4 would show a model six hours of the day only; these move on by one step now and
    then, by `stride` steps in the length of a patch, so that windows still share their patches' prompts.

    >>> spread_starts(40, 4, 24).tolist()
    [0, 4, 9, 14, 18, 23, 24, 28, 33, 38]
    """
    places = torch.arange(-(-count // stride)) * stride
    places = places + (places * stride // token_len) % stride
    return places[places < count]


def repeat_last(x_BL: Tensor, period: int, horizon: int) -> Tensor:
    """[B, horizon]: the last `period` steps again and again, the forecast that any other must beat.

    >>> repeat_last(torch.tensor([[1.0, 2.0, 3.0]]), 2, 5).tolist()
    [[2.0, 3.0, 2.0, 3.0, 2.0]]
    """
    return x_BL[:, -period:].repeat(1, -(-horizon // period))[:, :horizon]
