"""Coterie: mixtures of experts on one small core.

The names below are imported on first use, so that ``import coterie`` and ``coterie --help`` stay fast.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Routing": "coterie.nn",
    "Router": "coterie.nn",
    "MoE": "coterie.nn",
    "SwiGLUExperts": "coterie.nn",
    "MLPExperts": "coterie.nn",
    "fit": "coterie.train",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in {"nn", "kernels", "models", "train", "data", "report"}:
        return import_module(f"coterie.{name}")
    raise AttributeError(f"module 'coterie' has no attribute {name!r}")
