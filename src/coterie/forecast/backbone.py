"""The frozen language model under a forecaster: any causal one in a folder, or a tiny one trained here.

A real language model embeds numbers so that close ones look alike. The tiny one is given that: its vocabulary
has a token per bin of each statistic, whose embedding is a smooth function of the bin.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TINY = "tiny"

# what the tiny model reads as a number: after which word (or in which part of a time), from, to, tokens;
# times of day, week and year go round
_SCALES = {"mean": (-5.0, 5.0, 32), "deviation": (0.0, 2.0, 32), "change": (-4.0, 4.0, 32)}
_CYCLES = {"hour": 24, "weekday": 7, "month": 12}
_WORDS = ("<pad>", *_SCALES)  # it skips all others: at this width they would drown the numbers in the mean
_PIECES = re.compile(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d|-?\d+\.\d+|{'|'.join(_SCALES)}")


class Reader(Protocol):
    """Texts to token ids [B, S] and the mask [B, S] of what is no padding, padded on the right."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]: ...


class Backbone(nn.Module):
    """A frozen causal language model: embeddings in, last hidden states out.

    Gradients flow through it to its inputs, never to its weights.

    Args:
        name: what it is called in errors and saved files; a folder, or "tiny".
        model: the decoder, without its head.
        read: its tokenizer.

    Attributes: `dim`, width D of embeddings and states; `digest`, of its configuration and weights.
    """

    def __init__(self, name: str, model: nn.Module, read: Reader) -> None:
        super().__init__()
        self.name, self.model, self.read = name, model.eval().requires_grad_(False), read
        self.dim = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        config: Any = model.config
        if int(config.hidden_size) != self.dim:
            raise ValueError(
                f"{name} embeds tokens in {self.dim} numbers but has states of {config.hidden_size}; use a "
                "model in which they are equal"
            )

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(False)  # frozen: no dropout either

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the sizes and weights. Reads them all once."""
        if not hasattr(self, "_digest"):
            self._digest = _digest(self.model)
        return self._digest

    def forward(self, embedded_BSD: Tensor) -> Tensor:
        states_BSD: Tensor = self.model(inputs_embeds=embedded_BSD, use_cache=False).last_hidden_state
        return states_BSD

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Last hidden states [B, S, D] of texts, and the mask [B, S] of what is no padding."""
        ids_BS, mask_BS = self.read(texts)
        output = self.model(input_ids=ids_BS, attention_mask=mask_BS.long(), use_cache=False)
        return output.last_hidden_state, mask_BS


def load_backbone(name: str) -> Backbone:
    """The backbone of a name.

    Args:
        name: "tiny", or a folder with a causal language model of transformers and its tokenizer.

    Raises ValueError where there is no such folder, or its model looks ahead: it would read off what it is
    to forecast.
    """
    if name == TINY:
        return tiny_backbone()
    if not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"backbone={name!r} is no folder with a config.json; give that of a causal language model of "
            f"transformers, or {TINY!r}"
        )
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # the last real token is then found by the mask, whatever the model

    def read(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        batch = tokenizer(list(texts), return_tensors="pt", padding=True)
        return batch["input_ids"], batch["attention_mask"].bool()

    backbone = Backbone(name, AutoModel.from_pretrained(name, dtype=torch.float32), read)
    _check_causal(backbone)
    return backbone


@lru_cache(maxsize=4)
def tiny_backbone(steps: int = 300, seed: int = 0) -> Backbone:
    """Two layers of width 64, trained to repeat the prompt that they have just read, then frozen.

    Takes some seconds the first time in a process. torch's generator is left as it was.

    Args:
        steps: of training, 16 prompts each.
        seed: of weights and prompts.

    >>> states_BSD, mask_BS = tiny_backbone(steps=1).states(["Its mean is 0.5000."])
    >>> states_BSD.shape, mask_BS.all().item()
    (torch.Size([1, 2, 64]), True)
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = _tiny_model()
        model.model.embed_tokens.weight.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for step in range(steps):
            ids_BS = _random_prompts(16, with_time=step % 2 == 0)
            ids_BS = torch.cat([ids_BS, ids_BS], 1)
            logits_BSV = model(input_ids=ids_BS[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.zero_grad()
    return Backbone(TINY, model.model, read_tiny)


def untrained_tiny() -> Backbone:
    """The tiny model's architecture, for weights that were saved."""
    with torch.random.fork_rng(devices=[]):
        return Backbone(TINY, _tiny_model().model, read_tiny)


def read_tiny(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The tiny model's tokenizer: names of statistics, numbers in bins, times as month, weekday and hour.

    >>> read_tiny(["Its mean is 0.1000.", "Its mean is 0.1001."])[0].diff(dim=0).abs().sum()
    tensor(0)
    """
    rows = [_tokens(text) for text in texts]
    longest = max(map(len, rows))
    ids_BS = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids_BS, ids_BS != 0


def _tokens(text: str) -> list[int]:
    ids, kind = [], ""
    for piece in _PIECES.findall(text.lower()):
        if piece in _SCALES:
            kind = piece
            ids.append(_vocabulary()[piece])
        elif ":" in piece:
            time = datetime.fromisoformat(piece)
            parts = {"month": time.month - 1, "weekday": time.weekday(), "hour": time.hour}
            ids += [_vocabulary()[f"{part} {value}"] for part, value in parts.items()]
        elif kind:  # a number after the name of its statistic; any other means nothing to it
            low, high, bins = _SCALES[kind]
            place = (float(piece) - low) / (high - low) * (bins - 1)
            ids.append(_vocabulary()[f"{kind} {min(max(round(place), 0), bins - 1)}"])
    return ids


@lru_cache(maxsize=1)
def _vocabulary() -> dict[str, int]:
    sizes = {**{kind: bins for kind, (_, _, bins) in _SCALES.items()}, **_CYCLES}
    numbers = [f"{kind} {number}" for kind, count in sizes.items() for number in range(count)]
    return {token: index for index, token in enumerate([*_WORDS, *numbers])}


def _tiny_model() -> LlamaForCausalLM:
    vocabulary = _vocabulary()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    embedding_VD = 0.5 * torch.randn(len(vocabulary), 64)
    for kind, count in [*((k, s[2]) for k, s in _SCALES.items()), *_CYCLES.items()]:
        place_N1 = (
            torch.linspace(0, 1, count).unsqueeze(1)
            if kind in _SCALES
            else torch.arange(count)[:, None] / count
        )
        angle_NF = math.pi * place_N1 * torch.tensor([1.0, 2, 4, 8] if kind in _SCALES else [2.0, 4, 6, 8])
        smooth_NF = torch.cat([angle_NF.sin(), angle_NF.cos()], 1)
        if kind in _SCALES:
            smooth_NF = torch.cat([smooth_NF, 4 * place_N1 - 2], 1)
        first = vocabulary[f"{kind} 0"]
        embedding_VD[first : first + count] = smooth_NF @ torch.randn(smooth_NF.shape[1], 64) / 4
    model.model.embed_tokens.weight.data.copy_(embedding_VD)
    return model


def _random_prompts(count: int, *, with_time: bool) -> Tensor:
    """Prompts [count, S] of any statistics and, in every other batch, any time: all of one length."""
    from coterie.forecast.prompts import write_prompts

    places_B3 = torch.rand(count, 3)
    scales = torch.tensor([[low, high] for low, high, _ in _SCALES.values()])
    statistics_B3 = scales[:, 0] + places_B3 * (scales[:, 1] - scales[:, 0])
    times = None
    if with_time:
        seconds_B2 = torch.randint(2_000_000_000, (count, 2)).numpy()
        times = seconds_B2.astype("datetime64[s]")
    return read_tiny(write_prompts(statistics_B3, times))[0]


@torch.no_grad()
def _check_causal(backbone: Backbone) -> None:
    embedded_1SD = torch.linspace(-1, 1, 3 * backbone.dim).view(1, 3, -1)
    changed_1SD = embedded_1SD.clone()
    changed_1SD[:, -1] *= -1
    if not torch.allclose(backbone(embedded_1SD)[:, :-1], backbone(changed_1SD)[:, :-1], atol=1e-4):
        raise ValueError(
            f"{backbone.name} is no causal language model: its states depend on later tokens, from which a "
            "forecaster would read the answer"
        )


def _digest(model: nn.Module) -> str:
    config: Any = model.config
    sizes = {k: v for k, v in config.to_dict().items() if not k.startswith(("_", "transformers", "dtype"))}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
