"""What transformers' experts interface calls a bank of experts with, whichever way it passes it."""

from collections.abc import Mapping
from typing import Any

_NAMES = ("hidden_states", "top_k_index", "top_k_weights")


def call_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name: hidden_states, top_k_index, top_k_weights.

    >>> call_arguments((1, 2), {"top_k_weights": 3})
    {'hidden_states': 1, 'top_k_index': 2, 'top_k_weights': 3}
    """
    return {**dict(zip(_NAMES, args, strict=False)), **kwargs}


def changed_call(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with some arguments changed, each passed as it was: some banks know no other way.

    >>> changed_call((1, 2), {"top_k_weights": 3}, {"top_k_index": 5, "top_k_weights": 6})
    ((1, 5), {'top_k_weights': 6})
    """
    first = tuple(changes.get(name, arg) for name, arg in zip(_NAMES, args, strict=False))
    return first + args[len(_NAMES) :], {name: changes.get(name, value) for name, value in kwargs.items()}
