"""`coterie fit driftmoe`: streams of any length, a chunk in memory, each row predicted before learnt."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.data import check_columns, counted, import_pandas, records, stream_chunks
from coterie.estimate.columns import Columns
from coterie.estimate.run import Fitted
from coterie.stream import DriftMoEClassifier, PrequentialScore

if TYPE_CHECKING:
    import pandas as pd

NEEDS = ("target",)
TAKES = ("time", "features")
OPTIONS = DriftMoEClassifier

_ROWS = 4096  # of a chunk
_WINDOW = 1000


def fit(data: Path, columns: Columns, options: dict[str, Any]) -> Fitted:
    """Learns the rows in the file's order; the report is prequential, over all of them.

    Args:
        data: CSV, TSV, Parquet or ARFF.
        columns: one target; a time column, if given, must not decrease and is no feature.
        options: arguments of `DriftMoEClassifier`; the seed is 0 unless given.

    Raises ValueError: several targets, a missing label or a decreasing time (which row), what the estimator
    raises.
    """
    [target, *more] = columns.target
    if more:
        raise ValueError(f"driftmoe predicts one target; {len(columns.target)} were given")
    model = DriftMoEClassifier(**{"seed": 0, **options})
    score, seconds, latest = PrequentialScore(_WINDOW), 0.0, None
    for frame in counted(stream_chunks(data, _ROWS), f"chunks of {_ROWS} rows"):
        features, targets = columns.split(frame, str(data))
        latest = _check_time(frame, columns.time, latest, data)
        begun = time.perf_counter()
        for x, y in zip(records(features), targets[target].tolist(), strict=True):
            score.update(y, model.predict_one(x))
            model.learn_one(x, y)
        seconds += time.perf_counter() - begun
    values = score.values()
    report: dict[str, float | int | str] = {
        "instances": score.rows,
        "classes": len(model.classes_),
        "accuracy": values["acc"],
        "kappa-M": _said(values["kappa_m"]),
        "kappa-T": _said(values["kappa_t"]),
        f"accuracy, last {min(_WINDOW, score.rows)}": values["window_acc"],
        "instances per second": score.rows / seconds,
    }
    return Fitted(model, report, {"router": model.usage_.tolist()})


def predict(folder: Path, data: Path, columns: Columns) -> "Iterator[pd.DataFrame]":
    """One column named like the target, and one with the probability of each label."""
    model, pd = DriftMoEClassifier.load(folder), import_pandas()
    for frame in stream_chunks(data, _ROWS):
        names = columns.feature_names(list(frame.columns))
        check_columns(frame, names, str(data))
        proba_NC = model.predict_proba(frame[names])
        labels = pd.Series(model.classes_)[proba_NC.argmax(1)].to_numpy()
        shares = {f"P({label})": proba_NC[:, i] for i, label in enumerate(model.classes_)}
        yield pd.DataFrame({columns.target[0]: labels, **shares})


def _check_time(frame: "pd.DataFrame", column: str | None, latest: Any, data: Path) -> Any:
    if column is None:
        return None
    times = [*([] if latest is None else [latest]), *frame[column].tolist()]
    for i in range(1, len(times)):
        if not times[i - 1] <= times[i]:
            row = frame.index[i - (latest is not None)]
            raise ValueError(
                f"{data}: column {column!r}, row {row}: {times[i]!r} after {times[i - 1]!r}; a stream must "
                "be in the order of time"
            )
    return times[-1]


def _said(kappa: float) -> float | str:
    return "undefined: its baseline makes no mistake" if math.isnan(kappa) else kappa
