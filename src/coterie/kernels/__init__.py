"""Grouped expert computation: one function, several backends that agree."""

from coterie.kernels.activations import ACTIVATIONS, ClampedSwiGLU
from coterie.kernels.dispatch import Dispatch, sort_by_expert
from coterie.kernels.grouped import available_backends, default_backend, grouped_mlp
from coterie.kernels.low_bit import PackedBank, low_bit_mlp
from coterie.kernels.packed import PackedWeight
from coterie.kernels.prepack import Prepacked, prepacked

__all__ = [
    "ACTIVATIONS",
    "ClampedSwiGLU",
    "Dispatch",
    "PackedBank",
    "PackedWeight",
    "Prepacked",
    "available_backends",
    "default_backend",
    "grouped_mlp",
    "low_bit_mlp",
    "prepacked",
    "sort_by_expert",
]
