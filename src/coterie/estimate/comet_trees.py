"""`coterie fit comet-trees`: numbers are regressed, anything else is classified."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.data import check_columns, read_table, table_chunks
from coterie.estimate.columns import Columns
from coterie.estimate.run import Fitted
from coterie.models import estimator_kind
from coterie.tabular import COMETClassifier, COMETRegressor

if TYPE_CHECKING:
    import pandas as pd

NEEDS = ("target",)
TAKES = ("features",)
OPTIONS = COMETClassifier

_CLASSES = 20  # whole numbers with at most so many values are classes


def fit(data: Path, columns: Columns, options: dict[str, Any]) -> Fitted:
    """A fifth of the rows, drawn at random, is held out."""
    from sklearn.model_selection import train_test_split

    if len(columns.target) != 1:
        raise ValueError(f"comet-trees predicts one column; got --target {' --target '.join(columns.target)}")
    frame = read_table(data)
    features, targets = columns.split(frame, str(data))
    target = targets.iloc[:, 0]
    if len(frame) < 20:
        raise ValueError(f"{data} has {len(frame)} rows; give at least 20")
    options = {"random_state": 0, **options}
    classes = _is_class(target)
    model = (COMETClassifier if classes else COMETRegressor)(**options)
    several = classes and target.value_counts().min() > 1
    rows, held, y, y_held = train_test_split(
        features,
        target,
        test_size=0.2,
        random_state=options["random_state"],
        stratify=target if several else None,
    )
    model.fit(rows, y)
    weights = model.experts_of(held)
    report = {
        "rows": len(rows),
        "held-out rows": len(held),
        "features": len(features.columns),
        **(_classes_report(model, held, y_held) if classes else _numbers_report(model, held, y_held)),
        "experts per row": float((weights > 1e-5).sum(1).mean()),
        "epochs": model.n_iter_,
    }
    return Fitted(model, report, {"gate": weights.mean(0).tolist()})


def predict(folder: Path, data: Path, columns: Columns) -> "Iterator[pd.DataFrame]":
    """The prediction, and each class's probability where there are classes."""
    classes = estimator_kind(folder) == "COMETClassifier"
    model = (COMETClassifier if classes else COMETRegressor).load(folder)
    for frame in table_chunks(data, 50_000):
        check_columns(frame, model.feature_names_in_.tolist(), str(data))
        features = frame[model.feature_names_in_.tolist()]
        predicted = features[[]].assign(**{columns.target[0]: model.predict(features)})
        if classes:
            for name, probability in zip(model.classes_, model.predict_proba(features).T, strict=True):
                predicted[f"probability of {name}"] = probability
        yield predicted


def _is_class(target: "pd.Series[Any]") -> bool:
    whole = target.dtype.kind in "iub" or (target.dtype.kind == "f" and bool((target % 1 == 0).all()))
    return target.dtype.kind not in "iuf" or (whole and target.nunique() <= _CLASSES)


def _classes_report(model: COMETClassifier, rows: Any, y: Any) -> dict[str, float | int | str]:
    from sklearn.metrics import accuracy_score, log_loss

    majority = float((y == y.mode().iloc[0]).mean())
    return {
        "task": f"classification, {len(model.classes_)} classes",
        "accuracy": float(accuracy_score(y, model.predict(rows))),
        "accuracy of the commonest class": majority,
        "log loss (nats)": float(log_loss(y, model.predict_proba(rows), labels=model.classes_)),
    }


def _numbers_report(model: COMETRegressor, rows: Any, y: Any) -> dict[str, float | int | str]:
    error = np.asarray(y, dtype=float) - model.predict(rows)
    return {
        "task": "regression",
        "R²": float(1 - (error**2).sum() / ((y - y.mean()) ** 2).sum()),
        "root mean squared error": float(np.sqrt((error**2).mean())),
        "mean absolute error": float(np.abs(error).mean()),
    }
