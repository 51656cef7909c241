"""Decisions about people of several groups, chunk by chunk in order of time: drawn with a drift, or read."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coterie.data.decisions import compas, mortgages
from coterie.data.tables import import_pandas, read_table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Chunk:
    """Some rows: features, labels [n] of 0 and 1, and the group of each row [n]."""

    X: "pd.DataFrame"
    y: NDArray[Any]
    group: NDArray[Any]


@dataclass(frozen=True)
class GroupStream:
    """Chunks in order; `drift` is the first after the change."""

    chunks: list[Chunk]
    drift: int


def group_drift(chunks: int, rows: int, drift: int, *, seed: int = 0) -> GroupStream:
    """A stream that no single linear model fits, and whose drift opens a gap between two groups.

    Six normal features; the sign of the sixth says which of two linear rules holds. 35% of rows belong to
    group 1. From the drift on, that group's third feature is lower by 0.8, and beside that its log-odds by
    0.8, while the other group's rise by 0.3.

    Args:
        chunks: how many.
        rows: of each.
        drift: the first chunk, from 0, after the change.
        seed: of all that is drawn.

    >>> stream = group_drift(3, 50, 2)
    >>> len(stream.chunks), stream.chunks[0].X.shape, sorted(set(stream.chunks[0].group.tolist()))
    (3, (50, 6), [0, 1])
    """
    rng = np.random.default_rng(seed)
    rules = np.array([[1.5, -1.2, 1.0, 0.8, 0.0, 0.0], [-1.2, 1.5, 0.8, 0.6, 0.0, 0.0]])
    made = []
    for number in range(chunks):
        x, group = rng.standard_normal((rows, 6)), rng.random(rows) < 0.35
        if number >= drift:
            x[:, 2] -= 0.8 * group
        log_odds = 1.5 * (x * rules[(x[:, 5] <= 0).astype(int)]).sum(1)
        if number >= drift:
            log_odds += np.where(group, -0.8, 0.3)
        y = rng.random(rows) < 1 / (1 + np.exp(-log_odds))
        made.append(Chunk(numbered_columns(x), y.astype(int), group.astype(int)))
    return GroupStream(made, drift)


def numbered_columns(x: NDArray[Any]) -> "pd.DataFrame":
    """An array as a frame with columns x1, x2, …"""
    frame: pd.DataFrame = import_pandas().DataFrame(x)
    return frame.set_axis([f"x{j}" for j in range(1, x.shape[1] + 1)], axis=1)


def read_group_stream(path: Path) -> GroupStream:
    """A HMDA Loan Application Register, or COMPAS's two-year scores; see `mortgages`, `compas`.

    Chunks follow each other in the order of `activity_year` or of the file, about 1500 rows each, but at
    least 4 and at most 24; the drift is taken to be where the second year begins, or the middle.

    The group is `derived_race` (HMDA) or `race`; rows without one are left out, and groups of under 40 rows
    per chunk, whose rates would be noise.

    Raises:
        ValueError: columns of neither, a file that cannot be read, under four chunks of 200 rows, or one
            group.
    """
    frame = read_table(path)
    if "action_taken" in frame.columns:
        table, label, group = mortgages(frame), "action_taken", "derived_race"
    elif "two_year_recid" in frame.columns:
        table, label, group = compas(frame), "two_year_recid", "race"
    else:
        raise ValueError(f"{path} has neither action_taken (HMDA LAR) nor two_year_recid (COMPAS)")
    count = max(4, round(len(table) / max(1500, len(table) / 24)))
    counts = table[group].value_counts()
    table = table[table[group].isin(counts.index[counts >= 40 * count])]
    found = table[group].nunique()
    if len(table) < 800 or found < 2:
        raise ValueError(f"{path} has {len(table)} usable rows of {found} groups; give at least 800 of two")
    drift = count // 2
    if "activity_year" in table.columns:
        table = table.sort_values("activity_year", kind="stable")
        years = table.pop("activity_year").to_numpy()
        first = int((years == years[0]).sum())
        if first < len(table):
            drift = min(max(round(first / len(table) * count), 2), count - 2)
    y, groups = table.pop(label).to_numpy(), table.pop(group).to_numpy()
    parts = np.array_split(np.arange(len(table)), count)
    return GroupStream([Chunk(table.iloc[rows], y[rows], groups[rows]) for rows in parts], drift)
