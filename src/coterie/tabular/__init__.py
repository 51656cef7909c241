"""Tables: estimators with scikit-learn's conventions. Imported on first use, as they need scikit-learn."""

from importlib import import_module
from typing import Any

_HOME = {
    "COMETClassifier": "coterie.tabular.comet_trees",
    "COMETRegressor": "coterie.tabular.comet_trees",
    "FEAMOEClassifier": "coterie.tabular.feamoe",
    "burden_gap": "coterie.tabular.fairness",
    "demographic_parity_gap": "coterie.tabular.fairness",
    "equalized_odds_gap": "coterie.tabular.fairness",
    "fairness_report": "coterie.tabular.fairness",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'coterie.tabular' has no attribute {name!r}")
