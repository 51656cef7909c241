"""Estimators for tables, with scikit-learn's conventions. They need `pip install 'coterie[tables]'`."""

from coterie.tabular.comet_trees import COMETClassifier, COMETRegressor

__all__ = ["COMETClassifier", "COMETRegressor"]
