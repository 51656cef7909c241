"""Prequential evaluation: every row is predicted, scored, and then learnt."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from coterie.data import import_pandas

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("acc", "kappa_m", "kappa_t", "recovery")
_RECOVERED = 0.02  # below the accuracy before the drift


def prequential(
    model: Any,
    stream: Iterable[tuple[Mapping[Any, Any], Any]],
    metrics: Sequence[str] = METRICS,
    *,
    window: int = 1000,
    label_delay: int = 0,
    drifts: Sequence[int] | None = None,
) -> "pd.DataFrame":
    """Test, then train, row after row, for any river classifier.

    Args:
        model: with `predict_one(x)` and `learn_one(x, y)`.
        stream: (features, label), in order.
        metrics: columns to compute. "acc": share of right predictions so far. "kappa_m": how far it is on the
            way from the running majority class's accuracy to 1. "kappa_t": the same from that of repeating
            the last label. "recovery": rows since the last drift until the last `window` rows, all after it,
            were as accurate as the `window` rows before it, less 0.02; NaN as long as they are not.
        window: rows between two rows of the result, and of the sliding accuracy.
        label_delay: rows that pass before a label is known. The row itself waits with it: the model learns
            what belongs together.
        drifts: rows where the concept changes; None for the stream's own `positions`, if it has any.

    Returns: a frame with `instances`, the metrics, and `window_acc`, the accuracy of the last `window` rows;
    its last line is the whole stream. A kappa is NaN where its baseline makes no mistake.

    Raises ValueError: an unknown metric, window below 1, a negative delay, an empty stream.

    >>> class Repeat:
    ...     last = None
    ...     def predict_one(self, x): return self.last
    ...     def learn_one(self, x, y): self.last = y
    >>> frame = prequential(Repeat(), [({}, y) for y in "aabbaabb"], window=4)
    >>> frame["acc"].tolist(), frame["kappa_t"].tolist()
    ([0.5, 0.5], [0.0, 0.0])
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise ValueError(f"no metric {unknown[0]!r}; use some of {', '.join(METRICS)}")
    if window < 1 or label_delay < 0:
        raise ValueError(f"window={window}, label_delay={label_delay}; should be window ≥ 1, label_delay ≥ 0")
    score = PrequentialScore(window, getattr(stream, "positions", ()) if drifts is None else drifts)
    waiting: deque[tuple[Mapping[Any, Any], Any]] = deque()
    lines = []
    for x, y in stream:
        score.update(y, model.predict_one(x))
        if label_delay:
            waiting.append((dict(x), y))
            if len(waiting) > label_delay:
                model.learn_one(*waiting.popleft())
        else:
            model.learn_one(x, y)
        if score.rows % window == 0:
            lines.append(score.values())
    if not score.rows:
        raise ValueError("the stream has no rows")
    if score.rows % window:
        lines.append(score.values())
    return import_pandas().DataFrame(lines)[["instances", *metrics, "window_acc"]]


class PrequentialScore:
    """The metrics of `prequential`, row by row.

    Args:
        window: rows of the sliding accuracy.
        drifts: rows where the concept changes.

    `rows` counts those that were scored.
    """

    def __init__(self, window: int, drifts: Sequence[int] = ()) -> None:
        self.rows = 0
        self._drifts = frozenset(drifts)
        self._right = self._majority_right = self._repeat_right = self._recent_right = 0
        self._recent: deque[bool] = deque(maxlen=window)
        self._labels: dict[Any, int] = {}
        self._majority: Any = None
        self._last: Any = None
        self._drift: int | None = None
        self._before, self._recovery = math.nan, math.nan

    def update(self, y: Any, predicted: Any) -> None:
        """Scores one prediction; None is a wrong one."""
        if self.rows in self._drifts:
            self._drift, self._before, self._recovery = self.rows, self.window_accuracy, math.nan
        right = predicted is not None and bool(predicted == y)
        self._right += right
        self._majority_right += self.rows > 0 and self._majority == y
        self._repeat_right += self.rows > 0 and self._last == y
        if len(self._recent) == self._recent.maxlen:
            self._recent_right -= self._recent[0]
        self._recent.append(right)
        self._recent_right += right
        self._labels[y] = self._labels.get(y, 0) + 1
        if self.rows == 0 or self._labels[y] > self._labels[self._majority]:
            self._majority = y
        self._last = y
        self.rows += 1
        if self._drift is not None and math.isnan(self._recovery):
            since = self.rows - self._drift
            if since >= (self._recent.maxlen or 1) and self.window_accuracy >= self._before - _RECOVERED:
                self._recovery = float(since)

    @property
    def window_accuracy(self) -> float:
        return self._recent_right / len(self._recent) if self._recent else math.nan

    def values(self) -> dict[str, float]:
        """The metrics so far, by name."""
        accuracy = self._right / self.rows
        return {
            "instances": self.rows,
            "acc": accuracy,
            "kappa_m": _above(accuracy, self._majority_right / self.rows),
            "kappa_t": _above(accuracy, self._repeat_right / self.rows),
            "recovery": self._recovery,
            "window_acc": self.window_accuracy,
        }


def _above(accuracy: float, baseline: float) -> float:
    return (accuracy - baseline) / (1 - baseline) if baseline < 1 else math.nan
