"""Covariates by formula: "age + school + age:income" to a standardised design and back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from coterie.data import check_columns, import_pandas
from coterie.data.tables import as_text

if TYPE_CHECKING:
    import pandas as pd

_Array = npt.NDArray[np.float64]


def terms_of(formula: str) -> list[str]:
    """The terms of a formula, in order.

    >>> terms_of("age + school + age:income")
    ['age', 'school', 'age:income']
    """
    if not formula.strip():
        return []
    terms = [":".join(part.strip() for part in term.split(":")) for term in formula.split("+")]
    if any(not part for term in terms for part in term.split(":")):
        raise ValueError(f"formula {formula!r} has an empty term; write columns as 'a + b + a:b'")
    twice = next((term for term in terms if terms.count(term) > 1), None)
    if twice:
        raise ValueError(f"formula {formula!r} names {twice!r} twice")
    return terms


class Covariates:
    """The design of a formula: an intercept, then a column per number and per category but the first.

    Numbers are standardised with the mean and deviation of the frame it was fitted on, so that an optimiser
    sees columns of one size; `units` takes coefficients back to the units of the table.

    Args:
        formula: terms joined by "+": a column of numbers, a column of texts (dummies against its first
            category in alphabetical order), or a product of columns of numbers, "a:b". "" for none.

    After `fit`: `names`, one per column, "Intercept" first; `units` [columns, columns].

    >>> pd = import_pandas()
    >>> frame = pd.DataFrame({"age": [5.0, 6.0, 7.0], "sex": ["m", "f", "m"]})
    >>> covariates = Covariates("age + sex").fit(frame)
    >>> covariates.names, covariates.transform(frame).round(2).tolist()[0]
    (['Intercept', 'age', 'sex=m'], [1.0, -1.22, 0.71])
    """

    def __init__(self, formula: str) -> None:
        self.formula, self.terms = formula, terms_of(formula)
        self.categories: dict[str, list[str]] = {}
        self.names: list[str] = []
        self.means: list[float] = []
        self.deviations: list[float] = []

    @property
    def columns(self) -> list[str]:
        """The columns of the table that it reads."""
        return list(dict.fromkeys(part for term in self.terms for part in term.split(":")))

    @property
    def units(self) -> _Array:
        """U: coefficients of the standardised columns @ U are those of the table's columns."""
        units = np.eye(len(self.names))
        for column, (mean, deviation) in enumerate(zip(self.means, self.deviations, strict=True), start=1):
            units[column, column] = 1 / deviation
            units[column, 0] = -mean / deviation
        return units

    def fit(self, frame: "pd.DataFrame", rows: Sequence[Any] | None = None) -> "Covariates":
        """Learns categories, means and deviations.

        Args:
            frame: one row per person.
            rows: what messages call the rows; default the frame's index.

        Raises ValueError: a column that is missing, empty in some row, constant, or infinite.
        """
        check_columns(frame, self.columns)
        for name in self.columns:
            if not _is_number(frame[name]):
                _no_missing(frame[name], rows)
                self.categories[name] = sorted({as_text(value) for value in frame[name]})
        raw, names = self._raw(frame, rows)
        self.names = ["Intercept", *names]
        self.means, self.deviations = raw.mean(0).tolist(), raw.std(0).tolist()
        for name, mean, deviation in zip(names, self.means, self.deviations, strict=True):
            if deviation <= 1e-12 * max(abs(mean), 1):
                raise ValueError(f"covariate {name!r} is {mean:g} in every row; leave it out")
        if np.linalg.matrix_rank(self.transform(frame, rows)) < len(self.names):
            raise ValueError(f"the covariates {', '.join(names)} determine each other; leave one out")
        return self

    def transform(self, frame: "pd.DataFrame", rows: Sequence[Any] | None = None) -> _Array:
        """The design [rows, len(names)]. Raises ValueError as `fit` does, and for an unseen category."""
        raw, _ = self._raw(frame, rows)
        design: _Array = np.column_stack([np.ones(len(frame)), (raw - self.means) / self.deviations])
        return design

    def to_dict(self) -> dict[str, Any]:
        """What was learnt, as JSON can hold it."""
        learnt = ("formula", "categories", "names", "means", "deviations")
        return {name: getattr(self, name) for name in learnt}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Covariates":
        covariates = cls(saved["formula"])
        for name in ("categories", "names", "means", "deviations"):
            setattr(covariates, name, saved[name])
        return covariates

    def _raw(self, frame: "pd.DataFrame", rows: Sequence[Any] | None) -> tuple[_Array, list[str]]:
        check_columns(frame, self.columns)
        columns: list[_Array] = []
        names: list[str] = []
        for term in self.terms:
            if term in self.categories:
                for category in self.categories[term][1:]:
                    names.append(f"{term}={category}")
                    columns.append(_texts(frame[term], self.categories[term], rows) == category)
            else:
                names.append(term)
                parts = [self._numbers(frame[part], rows) for part in term.split(":")]
                columns.append(np.prod(parts, axis=0))
        return np.column_stack([np.zeros((len(frame), 0)), *columns]).astype(np.float64), names

    def _numbers(self, column: "pd.Series[Any]", rows: Sequence[Any] | None) -> _Array:
        if column.name in self.categories:
            raise ValueError(f"column {column.name!r} holds texts; only numbers can stand in a product a:b")
        if not _is_number(column):
            raise ValueError(f"covariate {column.name!r} holds texts where numbers were fitted")
        _no_missing(column, rows)
        numbers: _Array = column.to_numpy(np.float64)
        return numbers


def _is_number(column: "pd.Series[Any]") -> bool:
    return bool(import_pandas().api.types.is_numeric_dtype(column.dtype))


def _no_missing(column: "pd.Series[Any]", rows: Sequence[Any] | None) -> None:
    bad = column.isna().to_numpy()
    if _is_number(column):
        bad = bad | ~np.isfinite(column.to_numpy(np.float64, na_value=np.nan))
    if bad.any():
        first = int(bad.nonzero()[0][0])
        raise ValueError(
            f"covariate {column.name!r} is missing or infinite for {int(bad.sum())} persons, first for "
            f"{(column.index if rows is None else rows)[first]}; impute it or drop them"
        )


def _texts(column: "pd.Series[Any]", known: list[str], rows: Sequence[Any] | None) -> npt.NDArray[np.str_]:
    _no_missing(column, rows)
    texts = [as_text(value) for value in column]
    unseen = sorted({*texts} - {*known})
    if unseen:
        raise ValueError(f"covariate {column.name!r} is {unseen[0]!r}; fitted were {', '.join(known)}")
    return np.array(texts)
