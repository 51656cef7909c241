"""Grouped expert computation: one function, several backends that agree."""

from coterie.kernels.activations import ACTIVATIONS
from coterie.kernels.dispatch import Dispatch, sort_by_expert
from coterie.kernels.grouped import available_backends, default_backend, grouped_mlp

__all__ = [
    "ACTIVATIONS",
    "Dispatch",
    "available_backends",
    "default_backend",
    "grouped_mlp",
    "sort_by_expert",
]
