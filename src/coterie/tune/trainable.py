"""Some of a model's weights, down to single experts in a fused bank, for an optimiser that sees no others.

with trainable(model, experts_only(blocks)) as weights:
    optimizer = torch.optim.AdamW(weights.parameters)
    loss.backward(); weights.collect(); optimizer.step(); weights.write()
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.hf import MoEBlock
from coterie.hf.modules import get_tensor
from coterie.tune.attribute import Target

RouterScope = Literal["layer", "row"]

SCOPES = ("expert", "experts", "router", "all")
"""What is trained: the target and its router (UOE); or, to compare, all experts, all routers, everything."""


@dataclass(frozen=True, eq=False)
class Slice:
    """A parameter, or one expert's entry of it.

    Args:
        parameter: of the model; one entry per expert in its first dimension, if there is an index.
        index: of the expert; None for the whole parameter.
    """

    parameter: nn.Parameter
    index: int | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """The part of `tensor`, the parameter's or of its shape, that this is."""
        return tensor if self.index is None else tensor[self.index]


def scope_slices(
    model: PreTrainedModel,
    blocks: Sequence[MoEBlock],
    targets: Sequence[Target],
    scope: str,
    *,
    router: RouterScope = "layer",
) -> list[Slice]:
    """What a scope trains.

    Args:
        model: which the blocks are of.
        blocks: all its MoE blocks.
        targets: the experts, which have to exist in every scope.
        scope: one of SCOPES.
        router: of the scope "expert", as in `expert_slices`.

    Raises ValueError for an unknown scope, and as `expert_slices`.
    """
    chosen = expert_slices(model, blocks, targets, router=router)  # which also checks them
    if scope == "expert":
        return chosen
    if scope == "experts":
        return all_experts(model, blocks)
    if scope == "router":
        return all_routers(model, blocks)
    if scope == "all":
        return [Slice(p) for p in model.parameters()]
    raise ValueError(f"no scope {scope!r}; use one of {', '.join(SCOPES)}")


def expert_slices(
    model: PreTrainedModel,
    blocks: Sequence[MoEBlock],
    targets: Sequence[Target],
    *,
    router: RouterScope = "layer",
) -> list[Slice]:
    """All weights of some experts, and of the routers that serve them.

    Args:
        model: which the blocks are of.
        blocks: all its MoE blocks.
        targets: the experts.
        router: "layer": the whole gate matrix of an expert's block; "row": the expert's row of it.

    Raises ValueError for a block or an expert that does not exist, or another `router`.
    """
    if router not in ("layer", "row"):
        raise ValueError(f'router={router!r}; use "layer" or "row"')
    if not targets:
        raise ValueError("no expert was given to be trained; give at least one")
    found: list[Slice] = []
    for layer, expert in targets:
        if not 0 <= layer < len(blocks):
            raise ValueError(
                f"layer {layer}: the model has {len(blocks)} MoE blocks; use 0 … {len(blocks) - 1}"
            )
        block = blocks[layer]
        if not 0 <= expert < block.num_experts:
            raise ValueError(
                f"expert {expert}: {block.name} has {block.num_experts}; use 0 … {block.num_experts - 1}"
            )
        found += [Slice(p, expert) for p in _bank(model, block)]
        found += [Slice(p, expert if router == "row" else None) for p in _router(model, block)]
    return list({(id(s.parameter), s.index): s for s in found}.values())  # two experts may share a router


def all_experts(model: PreTrainedModel, blocks: Sequence[MoEBlock]) -> list[Slice]:
    """All routed experts of these blocks."""
    return [Slice(p) for block in blocks for p in _bank(model, block)]


def all_routers(model: PreTrainedModel, blocks: Sequence[MoEBlock]) -> list[Slice]:
    """The routers of these blocks."""
    return [Slice(p) for block in blocks for p in _router(model, block)]


class Weights:
    """Slices of a model and what an optimiser needs of them; `trainable` makes it.

    Attributes:
        parameters: one for each slice, in float32: a view where the model is in float32, else a copy, since
            a small step would be lost in 16 bits.
        count: numbers that are trained.
    """

    def __init__(self, slices: Sequence[Slice]) -> None:
        self._slices = slices
        self.parameters = [nn.Parameter(s.view(s.parameter.detach()).float()) for s in slices]
        self.count = sum(p.numel() for p in self.parameters)

    @torch.no_grad()
    def collect(self) -> None:
        """Takes the slices' gradients over from the model, whose own are dropped."""
        for piece, own in zip(self._slices, self.parameters, strict=True):
            grad = piece.parameter.grad
            own.grad = torch.zeros_like(own) if grad is None else piece.view(grad).float().clone()
        for piece in self._slices:
            piece.parameter.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Gives the model what the optimiser made of the slices."""
        for piece, own in zip(self._slices, self.parameters, strict=True):
            piece.view(piece.parameter.data).copy_(own)


@torch.no_grad()
def snapshot(slices: Sequence[Slice]) -> list[Tensor]:
    """Copies of the slices as they are in the model."""
    return [piece.view(piece.parameter.data).clone() for piece in slices]


@contextmanager
def replaced(slices: Sequence[Slice], values: Sequence[Tensor]) -> Iterator[None]:
    """The model with other values in the slices, such as a `snapshot`, while the context is open."""
    now = snapshot(slices)
    try:
        _put(slices, values)
        yield
    finally:
        _put(slices, now)


@torch.no_grad()
def _put(slices: Sequence[Slice], values: Sequence[Tensor]) -> None:
    for piece, value in zip(slices, values, strict=True):
        piece.view(piece.parameter.data).copy_(value)


@contextmanager
def trainable(model: PreTrainedModel, slices: Sequence[Slice]) -> Iterator[Weights]:
    """Freezes a model but for these slices while the context is open.

    A fused bank holds all experts of a block in one parameter. An optimiser that was given that parameter
    would move experts without a gradient, too, by weight decay and by the moments of earlier steps; it is
    given views of the slices instead, and all else stays as it is, bit by bit.

    Args:
        model: its parameters that ask for gradients are the same after as before.
        slices: no two of which overlap.

    >>> from coterie.hf import find_moe_blocks
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
    >>> with trainable(model, expert_slices(model, find_moe_blocks(model), [Target(1, 3)])) as weights:
    ...     weights.count == 3 * 8 * 16 + 4 * 16, sum(p.requires_grad for p in model.parameters())
    (True, 3)
    """
    asked = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    for piece in slices:
        piece.parameter.requires_grad_(True)
    try:
        yield Weights(slices)
    finally:
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
            parameter.grad = None


def _bank(model: PreTrainedModel, block: MoEBlock) -> list[nn.Parameter]:
    return _parameters(model, block.layout.experts.values())


def _router(model: PreTrainedModel, block: MoEBlock) -> list[nn.Parameter]:
    roles = ("rows", "bias")  # what only biases the choice of experts is trained by no gradient
    return _parameters(model, [block.layout.router[role] for role in roles if role in block.layout.router])


def _parameters(model: PreTrainedModel, names: Iterable[str]) -> list[nn.Parameter]:
    tensors = [get_tensor(model, name) for name in names]
    return [t for t in tensors if isinstance(t, nn.Parameter)]
