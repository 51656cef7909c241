"""Activations an expert may use, by the name a configuration file gives them."""

from collections.abc import Callable
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


def get_activation(name: str) -> Activation:
    """The function behind `name`; ValueError lists the names there are."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is not known; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
