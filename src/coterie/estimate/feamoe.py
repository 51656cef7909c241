"""FEAMOE on a table, chunk by chunk, so that the table may be larger than memory.

With `--time`, rows come in that column's order, and each chunk is scored before it is learnt from. Without, a
random 30% of every chunk is held out, and a second pass scores them with what came of the whole. A table
whose target is `action_taken` is taken for a Loan Application Register (HMDA), of which
`coterie.data.mortgages` keeps what was decided.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coterie.data import check_columns, counted, mortgages, table_chunks
from coterie.estimate import Columns, Fitted
from coterie.tabular.fairness import fairness_report
from coterie.tabular.feamoe import FEAMOEClassifier
from coterie.tabular.prequential import FEWEST_ROWS

if TYPE_CHECKING:
    import pandas as pd

NEEDS = ("target",)
TAKES = ("sensitive", "time", "features")
OPTIONS = FEAMOEClassifier

_ROWS, _HELD_OUT = 1500, 0.3


def fit(data: Path, columns: Columns, options: dict[str, Any]) -> Fitted:
    if len(columns.target) != 1:
        raise ValueError(f"feamoe predicts one target; found {', '.join(columns.target)}")
    model = FEAMOEClassifier(**options)
    if model.fairness is not None and columns.sensitive is None:
        raise ValueError("feamoe needs --sensitive COLUMN, or --set fairness=null to watch no group")
    rows = model.chunk_size or _ROWS
    scored = _Scored(model)
    if columns.time:
        for chunk in _chunks(data, columns, rows):
            if hasattr(model, "background_"):
                scored.add(*chunk)
            model.partial_fit(*chunk)
    else:
        for number, (X, y, group) in enumerate(counted(_chunks(data, columns, rows), "chunks")):
            kept = ~_held_out(number, len(X))
            model.partial_fit(X[kept], y[kept], None if group is None else group[kept])
        for number, (X, y, group) in enumerate(counted(_chunks(data, columns, rows), "chunks")):
            held = _held_out(number, len(X))
            scored.add(X[held], y[held], None if group is None else group[held])
    if not scored.rows:
        raise ValueError(
            f"{data} makes one chunk of {rows} rows and leaves none to score; --set chunk_size=N below that"
        )
    grown = [entry for entry in model.history_ if entry["grown"]]
    report: dict[str, float | int | str] = {
        "rows scored": scored.rows,
        **scored.report(),
        "chunks": len(model.history_),
        "chunks with accuracy drift": sum(entry["accuracy_drift"] for entry in model.history_),
        "chunks with fairness drift": sum(entry["fairness_drift"] for entry in model.history_),
        "chunks that added an expert": len(grown),
        "experts": model.n_experts_,
    }
    return Fitted(model, report, {"gate": model.expert_usage_.tolist()})


def predict(folder: Path, data: Path, columns: Columns) -> "Iterator[pd.DataFrame]":
    """Each row's class and probabilities, in the order of the file."""
    import pandas as pd

    model = FEAMOEClassifier.load(folder)
    for frame in table_chunks(data, 50_000):
        check_columns(frame, model.columns_, str(data))
        probabilities = model.predict_proba(frame[model.columns_])
        result = pd.DataFrame({columns.target[0]: model.predict(frame[model.columns_])}, index=frame.index)
        for number, name in enumerate(model.classes_):
            result[f"probability of {name}"] = probabilities[:, number]
        yield result


Chunk = tuple["pd.DataFrame", NDArray[Any], NDArray[Any] | None]


def _chunks(data: Path, columns: Columns, rows: int) -> Iterator[Chunk]:
    """(X, y, group) of at least `rows` rows; the last may have half of that, or less where it is alone."""
    import pandas as pd

    ready: pd.DataFrame | None = None
    begun: list[pd.DataFrame] = []
    latest: Any = None
    for frame in table_chunks(data, rows):
        if columns.target == ("action_taken",):
            frame = mortgages(frame, columns.sensitive or "derived_race")
        if columns.time:
            check_columns(frame, [columns.time], str(data))
            latest = _check_order(data, frame[columns.time], latest)
        begun.append(frame)
        if sum(map(len, begun)) >= rows:
            if ready is not None:
                yield _roles(data, ready, columns)
            ready, begun = pd.concat(begun), []
    rest = sum(map(len, begun))
    if ready is not None and rest >= rows / 2:
        yield _roles(data, ready, columns)
        ready = None
    last = [*([] if ready is None else [ready]), *begun]
    if sum(map(len, last)):
        yield _roles(data, pd.concat(last), columns)


def _roles(data: Path, frame: "pd.DataFrame", columns: Columns) -> Chunk:
    features, target = columns.split(frame, str(data))
    group = None if columns.sensitive is None else frame[columns.sensitive].to_numpy()
    return features, target.iloc[:, 0].to_numpy(), group


def _check_order(data: Path, time: "pd.Series[Any]", latest: Any) -> Any:
    """The chunk's last time. ValueError naming the first row that is earlier than the one before it."""
    previous = time.shift(1)
    if len(time) and latest is not None:
        previous.iloc[0] = latest
    backwards = time.index[(time < previous).to_numpy()]
    if len(backwards):
        raise ValueError(
            f"{data}: column {time.name!r} goes back at row {backwards[0]}; sort the table by it"
        )
    return time.iloc[-1] if len(time) else latest


def _held_out(chunk: int, rows: int) -> NDArray[np.bool_]:
    return np.random.default_rng([0, chunk]).random(rows) < _HELD_OUT


class _Scored:
    """Decisions about rows that the model had not learnt from, a few bytes for each."""

    def __init__(self, model: FEAMOEClassifier) -> None:
        self.model, self.parts = model, list[tuple[NDArray[Any], ...]]()

    @property
    def rows(self) -> int:
        return sum(len(part[0]) for part in self.parts)

    def add(self, X: "pd.DataFrame", y: NDArray[Any], group: NDArray[Any] | None) -> None:
        if not len(X):
            return
        model = self.model
        wanted = model.classes_[1] if model.favourable is None else model.favourable
        number = int(wanted == model.classes_[1])
        probability = model.predict_proba(X)[:, number].astype(np.float32)
        distance = model.recourse_distance(X).astype(np.float32)
        groups = np.zeros(len(X), dtype=str) if group is None else group.astype(str)
        self.parts.append((y == wanted, model.predict(X) == wanted, groups, probability, distance))

    def report(self) -> dict[str, float]:
        y, yhat, groups, probability, distance = (
            np.concatenate(column) for column in zip(*self.parts, strict=True)
        )
        _, numbers, counts = np.unique(groups, return_inverse=True, return_counts=True)
        counted = counts[numbers] >= FEWEST_ROWS
        report = fairness_report(y, yhat, groups, probability)
        gaps = fairness_report(y[counted], yhat[counted], groups[counted], None, distance[counted])
        measured = {"accuracy": report["accuracy"], "auc": report["auc"]}
        measured |= {name: value for name, value in gaps.items() if name.endswith("gap")}
        return {name: value for name, value in measured.items() if not np.isnan(value)}
