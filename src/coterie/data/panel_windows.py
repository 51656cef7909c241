"""A panel as a model learns from it: one item per day, a window of history for every instrument; and splits
of time with a gap between their parts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from coterie.data.tables import import_pandas

if TYPE_CHECKING:
    import pandas as pd


class PanelWindows(Dataset[tuple[Tensor, Tensor]]):
    """The windows of a panel, day by day: the whole cross-section of a day is one item.

    An instrument has a window on a day when it has a row on each of the `window` days that end there, days
    being those that any instrument of the panel has: windows never cross a missing span.

    Args:
        features: float columns without gaps, indexed by (time, instrument), such as `daily_features` gives.
        window: L, days of a window, the current one included.
        label: what is to be predicted, over any rows; NaN where unknown. None for no labels.
        keep: rows to leave in the cross-sections (members of an index, not suspended); others serve as
            history only. None for all.
        days: only these days become items; None for every day with a window.

    Item i is (x [N, L, F], y [N]), float32, of the N instruments with a window on `days[i]`, in their order;
    y is NaN where the label is.

    Raises ValueError: a window below 1, or missing values in the features (which columns).

    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([range(5), ["A", "B"]]).drop((2, "B"))
    >>> windows = PanelWindows(pd.DataFrame({"x": range(9)}, index, dtype=float), window=2)
    >>> [(day, windows.rows(i).get_level_values(1).tolist()) for i, day in enumerate(windows.days)]
    [(1, ['A', 'B']), (2, ['A']), (3, ['A']), (4, ['A', 'B'])]
    >>> windows[1][0].squeeze(-1).tolist()
    [[2.0, 4.0]]
    """

    def __init__(
        self,
        features: "pd.DataFrame",
        window: int,
        *,
        label: "pd.Series[Any] | None" = None,
        keep: "pd.Series[bool] | None" = None,
        days: Sequence[Any] | None = None,
    ) -> None:
        if window < 1:
            raise ValueError(f"window={window}; should be at least 1 day")
        missing = features.columns[features.isna().any()]
        if len(missing):
            raise ValueError(f"features {', '.join(map(repr, missing))} have missing values; fill them first")
        features = features.sort_index(level=[1, 0])
        self.window, self.index = window, features.index
        self._values = torch.from_numpy(features.to_numpy(np.float32, copy=True))
        labels = np.full(len(features), np.nan) if label is None else label.reindex(self.index).to_numpy()
        self._labels = torch.from_numpy(labels.astype(np.float32))
        day_R, calendar = self.index.get_level_values(0).factorize(sort=True)
        ends = _window_ends(day_R, self.index.get_level_values(1).to_numpy(), window)
        if keep is not None:
            ends = ends[keep.reindex(self.index).to_numpy(dtype=bool, na_value=False)[ends]]
        if days is not None:
            ends = ends[calendar.isin(days)[day_R[ends]]]
        ends = ends[np.argsort(day_R[ends], kind="stable")]
        there, first = np.unique(day_R[ends], return_index=True)
        self.days: Any = calendar[there]
        self._ends = np.split(ends, first[1:]) if len(there) else []

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        ends_N = torch.from_numpy(self._ends[i])
        rows_NL = ends_N.unsqueeze(1) + torch.arange(1 - self.window, 1)
        return self._values[rows_NL], self._labels[ends_N]

    def labels(self, i: int) -> Tensor:
        """y [N] of item i alone."""
        return self._labels[torch.from_numpy(self._ends[i])]

    def rows(self, i: int) -> Any:
        """The index (time, instrument) of item i's predictions."""
        return self.index[self._ends[i]]


class Split(NamedTuple):
    """Days to learn from, to choose by and to test on, each an array in order of time."""

    train: Any
    valid: Any
    test: Any


def purged_splits(days: Any, *, train: int, valid: int, test: int, gap: int, horizon: int = 1) -> list[Split]:
    """Splits of time that walk forward by `test` days, with `gap` unused days between their parts.

    Args:
        days: the days there are, in any order, repeated or not.
        train: days to learn from.
        valid: days to choose by.
        test: days to test on; every day after the first `train + gap + valid + gap` is in at most one test.
        gap: days left out between train and valid, and between valid and test.
        horizon: days that a label looks ahead after the day it is traded on; with a smaller gap the last
            labels to learn from lie in the days to choose by.

    Returns: as many splits as there are full tests.

    Raises ValueError: leakage (gap < horizon), a part below 1 day, or too few days for one split.

    >>> [first, second] = purged_splits(range(14), train=4, valid=2, test=3, gap=1)
    >>> first.train.tolist(), first.valid.tolist(), first.test.tolist(), second.test.tolist()
    ([0, 1, 2, 3], [5, 6], [8, 9, 10], [11, 12, 13])
    """
    if gap < horizon:
        raise ValueError(
            f"leakage: labels look {horizon} days ahead but the gap is {gap}; use gap ≥ {horizon}"
        )
    if min(train, valid, test) < 1:
        raise ValueError(f"train={train}, valid={valid}, test={test}; each should be at least 1 day")
    days = import_pandas().Index(days).unique().sort_values()
    needed = train + valid + test + 2 * gap
    if len(days) < needed:
        raise ValueError(
            f"{len(days)} days do not hold {train} + {valid} + {test} and two gaps of {gap} ({needed} days)"
        )
    splits = []
    for start in range(0, len(days) - needed + 1, test):
        first_valid = start + train + gap
        first_test = first_valid + valid + gap
        splits.append(
            Split(
                days[start : start + train],
                days[first_valid : first_valid + valid],
                days[first_test : first_test + test],
            )
        )
    return splits


def _window_ends(day_R: Any, instrument_R: Any, window: int) -> Any:
    """Rows that end `window` days in a row of one instrument; rows are sorted by instrument, then day."""
    rows = np.arange(len(day_R))
    broken = np.ones(len(day_R), dtype=bool)
    broken[1:] = (instrument_R[1:] != instrument_R[:-1]) | (day_R[1:] != day_R[:-1] + 1)
    run_starts = np.maximum.accumulate(np.where(broken, rows, 0))
    return np.flatnonzero(rows - run_starts + 1 >= window)
