"""Activations an expert may use, by the name a configuration file gives them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (So et al. 2021, Primer)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": relu2,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class ClampedSwiGLU:
    """The gate of gpt-oss and its kin: g · σ(alpha · g) · (u + shift), g at most `limit`, u within ± limit.

    Args:
        limit: of gate and up.
        alpha: 1 makes g · σ(alpha · g) the SiLU.
        shift: added to up.

    >>> ClampedSwiGLU(limit=7.0, alpha=1.702, shift=1.0)(torch.tensor([100.0]), torch.tensor([-100.0]))
    tensor([-41.9997])
    """

    limit: float
    alpha: float = 1.0
    shift: float = 0.0

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.shift)


def get_activation(name: str) -> Activation:
    """The function behind `name`; ValueError lists the names there are."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is not known; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_activation(activation: str | ClampedSwiGLU, gated: bool) -> None:
    """ValueError where experts cannot have this activation."""
    if not isinstance(activation, ClampedSwiGLU):
        get_activation(activation)
    elif not gated:
        raise ValueError(f"{activation} is a gate; experts without one take a name in ACTIVATIONS")


def activate(pre: Tensor, activation: str | ClampedSwiGLU, gated: bool, interleaved: bool = False) -> Tensor:
    """Hidden values [..., F] of pre-activations: [..., F], or gates and ups in [..., 2F]."""
    if not gated:
        return get_activation(activation)(pre)  # type: ignore[arg-type]  # a gate was refused before
    gate, up = (pre[..., ::2], pre[..., 1::2]) if interleaved else pre.chunk(2, dim=-1)
    if isinstance(activation, ClampedSwiGLU):
        return activation(gate, up)
    return get_activation(activation)(gate) * up
