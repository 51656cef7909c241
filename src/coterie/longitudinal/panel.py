"""Repeated measurements of persons, from a wide or a long table to padded tensors.

Letters in this room: T persons (they are what the gate routes), K classes (experts), J occasions, P growth
factors, C covariates of the experts, D of the gate, each with an intercept column, M time-varying covariates.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coterie.data import check_columns, import_pandas
from coterie.longitudinal.covariates import Covariates, terms_of

if TYPE_CHECKING:
    import pandas as pd

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """Scores and covariates of T persons, float64.

    Args:
        y: [T, J] scores, 0 where missing.
        t: [T, J] times, 0 where the score is missing.
        seen: [T, J] 1 where there is a score, else 0.
        gate: [T, D] design of the gate.
        experts: [T, C] design of the experts.
        tvc: [T, J, M] time-varying covariates, 0 where the score is missing.
        persons: T names.
    """

    y: Tensor
    t: Tensor
    seen: Tensor
    gate: Tensor
    experts: Tensor
    tvc: Tensor
    persons: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.persons)

    @property
    def time_range(self) -> tuple[float, float]:
        """The first and the last time of a score."""
        times = self.t[self.seen > 0]
        return float(times.min()), float(times.max())

    def take(self, rows: npt.NDArray[Any]) -> "Panel":
        """The persons at these positions (or where a bool mask is True)."""
        positions = np.arange(len(self))[rows]
        chosen = torch.as_tensor(positions)
        tensors: dict[str, Any] = {f.name: getattr(self, f.name)[chosen] for f in fields(self)[:-1]}
        return replace(self, **tensors, persons=tuple(self.persons[row] for row in positions))


@dataclass(frozen=True)
class Layout:
    """Where scores and times are in a table.

    Args:
        y: in a wide table (one row per person) the prefix of the scores' numbered columns: y="Y" is Y1, Y2,
            …; in a long one (one row per person and occasion) the column.
        t: the same for times.
        person: the long table's column of persons; None for a wide table.
        tvc: time-varying covariates, "a + b": prefixes or columns like y.
    """

    y: str = "Y"
    t: str = "T"
    person: str | None = None
    tvc: str = ""

    def scores(self, frame: "pd.DataFrame") -> tuple[_Array, _Array, _Array, "pd.DataFrame"]:
        """(y [T, J], t [T, J], tvc [T, J, M], one row per person with its covariates, indexed by person).

        Missing scores are NaN. Raises ValueError for what `read_panel` names.
        """
        return self._wide(frame) if self.person is None else self._long(frame)

    def _wide(self, frame: "pd.DataFrame") -> tuple[_Array, _Array, _Array, "pd.DataFrame"]:
        numbers = _numbered(frame, self.y)
        blocks = []
        for prefix in (self.y, self.t, *terms_of(self.tvc)):
            found = _numbered(frame, prefix)
            if found != numbers:
                raise ValueError(
                    f"{self.y!r} has {len(numbers)} numbered columns ({_listed(self.y, numbers)}) but "
                    f"{prefix!r} has {len(found)} ({_listed(prefix, found)}); each score needs its {prefix}"
                )
            names = [f"{prefix}{number}" for number in numbers]
            blocks.append(np.column_stack([_floats(frame, name) for name in names]))
        y, t, *tvc = blocks
        return y, t, np.stack(tvc, -1) if tvc else np.zeros((*y.shape, 0)), frame

    def _long(self, frame: "pd.DataFrame") -> tuple[_Array, _Array, _Array, "pd.DataFrame"]:
        names = [self.y, self.t, *terms_of(self.tvc)]
        check_columns(frame, [str(self.person), *names])
        codes, persons = import_pandas().factorize(frame[self.person])
        if (codes < 0).any():
            row = frame.index[int((codes < 0).nonzero()[0][0])]
            raise ValueError(f"column {self.person!r}, row {row}: the person is missing")
        occasion = frame.groupby(self.person, sort=False).cumcount().to_numpy()
        shape = (len(persons), int(occasion.max()) + 1)
        blocks = []
        for name in names:
            block = np.full(shape, np.nan)
            block[codes, occasion] = _floats(frame, name)
            blocks.append(block)
        y, t, *tvc = blocks
        first = frame.drop_duplicates(self.person).set_index(self.person)
        return y, t, np.stack(tvc, -1) if tvc else np.zeros((*y.shape, 0)), first

    def check_constant(self, frame: "pd.DataFrame", columns: Sequence[str]) -> None:
        """ValueError where a person of a long table has two values of one covariate."""
        if self.person is None:
            return
        check_columns(frame, columns)
        for name in columns:
            values = frame.groupby(self.person, sort=False)[name].nunique(dropna=False)
            if (values > 1).any():
                raise ValueError(
                    f"covariate {name!r} changes over time for {self.person}={values.index[values > 1][0]}; "
                    "covariates of gate and experts belong to the person (give it as tvc instead)"
                )


def read_panel(
    frame: "pd.DataFrame", layout: Layout, gate: Covariates, experts: Covariates, *, learn: bool = False
) -> Panel:
    """The panel of a table.

    Args:
        frame: the table.
        layout: where its scores are.
        gate: makes the gate's design.
        experts: makes the experts' design.
        learn: fit both to this table first.

    Raises ValueError: columns that are missing or hold no numbers; prefixes with different numbers of
    columns; a person without any score; a score without its time or its time-varying covariate; times that
    do not increase; covariates that are missing, constant, or differ within a person.
    """
    if not len(frame):
        raise ValueError("the table has no rows")
    layout.check_constant(frame, [*gate.columns, *experts.columns])
    y, t, tvc, table = layout.scores(frame)
    persons = tuple(table.index)
    seen = ~np.isnan(y)
    _check_scores(layout, t, tvc, seen, persons)
    if learn:
        gate.fit(table, persons)
        experts.fit(table, persons)
    return Panel(
        y=torch.from_numpy(np.where(seen, y, 0.0)),
        t=torch.from_numpy(np.where(seen, t, 0.0)),
        seen=torch.from_numpy(seen.astype(np.float64)),
        gate=torch.from_numpy(gate.transform(table, persons)),
        experts=torch.from_numpy(experts.transform(table, persons)),
        tvc=torch.from_numpy(np.where(seen[..., None], tvc, 0.0)),
        persons=persons,
    )


def _check_scores(
    layout: Layout, t: _Array, tvc: _Array, seen: npt.NDArray[np.bool_], persons: Sequence[Any]
) -> None:
    def complain(bad_T: Any, text: str) -> None:
        if bad_T.any():
            raise ValueError(f"{text} for {layout.person or 'row'}={persons[int(bad_T.nonzero()[0][0])]}")

    complain(~seen.any(1), f"no {layout.y} at all")
    complain((seen & np.isnan(t)).any(1), f"a {layout.y} without its {layout.t}")
    for name, values in zip(terms_of(layout.tvc), np.moveaxis(tvc, -1, 0), strict=True):
        complain((seen & np.isnan(values)).any(1), f"a {layout.y} without its {name}")
    latest = np.maximum.accumulate(np.where(np.isnan(t), -np.inf, t), axis=1)
    backwards = t[:, 1:] <= latest[:, :-1]  # False beside a missing time
    complain(backwards.any(1), "times must increase")


def _numbered(frame: "pd.DataFrame", prefix: str) -> list[int]:
    matches = (re.fullmatch(re.escape(prefix) + r"(\d+)", str(name)) for name in frame.columns)
    numbers = sorted(int(match[1]) for match in matches if match and str(int(match[1])) == match[1])
    if not numbers:
        there = ", ".join(map(str, frame.columns[:20])) + (", …" if len(frame.columns) > 20 else "")
        raise ValueError(
            f"the table has no columns {prefix}1, {prefix}2, …; it has {there}. For a long table give person="
        )
    return numbers


def _listed(prefix: str, numbers: Sequence[int]) -> str:
    return f"{prefix}{numbers[0]} … {prefix}{numbers[-1]}" if len(numbers) > 1 else f"{prefix}{numbers[0]}"


def _floats(frame: "pd.DataFrame", name: str) -> _Array:
    pd = import_pandas()
    read: _Array = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = np.isnan(read) & frame[name].notna().to_numpy() | np.isinf(read)
    if wrong.any():
        row = int(wrong.nonzero()[0][0])
        found = frame[name].iloc[row]
        raise ValueError(
            f"column {name!r}, row {frame.index[row]}: {found!r} where a finite number should be"
        )
    return read
