"""Rankers: several behaviours at once, and one user's history at a time. Imported on first use."""

from importlib import import_module
from typing import Any

_HOME = {
    "AWMoERanker": "coterie.recsys.aw_moe_ranker",
    "MultiTaskMoEClassifier": "coterie.recsys.home_mtl",
    "MultiTaskMoE": "coterie.recsys.multi_task",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'coterie.recsys' has no attribute {name!r}")
