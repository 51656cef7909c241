"""Rows of a stream, dicts of numbers and categories, as vectors whose columns may still grow."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from coterie.data import records
from coterie.data.tables import as_text

if TYPE_CHECKING:
    import pandas as pd


class StreamColumns:
    """Turns dicts into vectors: a number is a column, a category is one column per value seen.

    Features may come and go, as river's may. An absent number, or None, is NaN in the vector; an absent or
    unseen category is 0 in all its columns.

    Args:
        impute: take NaN for absent; it is refused otherwise.

    >>> columns = StreamColumns()
    >>> columns.learn({"price": 2.5, "day": "Mon"}, row=0)
    >>> columns.learn({"price": 3.0, "day": "Tue"}, row=1)
    >>> columns.names
    [('day', 'Mon'), ('price', None), ('day', 'Tue')]
    >>> columns.vector({"price": 4, "day": "Sun"}, row=2).tolist()
    [0.0, 4.0, 0.0]
    >>> columns.vector({"price": float("nan"), "day": "Sun"}, row=3)
    Traceback (most recent call last):
    ValueError: row 3: feature 'price' is nan; leave it out, or use impute=True to take the mean instead
    """

    def __init__(self, *, impute: bool = False) -> None:
        self.impute = impute
        self.names: list[tuple[Any, str | None]] = []  # feature and, for one value of a category, the value
        self._at: dict[tuple[Any, str | None], int] = {}
        self._categories: set[Any] = set()

    def __len__(self) -> int:
        return len(self.names)

    def learn(self, x: Mapping[Any, Any], row: int) -> None:
        """Adds columns for what is new, in an order that does not depend on the dict's.

        Raises ValueError as `vector` does.
        """
        if self._simple(x) is not None:
            return
        self._values(x, row)
        new = [key for key in map(self._key, x.items()) if key is not None and key not in self._at]
        for key in sorted(new, key=str):
            self.add(key)

    def add(self, key: tuple[Any, str | None]) -> None:
        """One more column."""
        self._at[key] = len(self.names)
        self.names.append(key)
        if key[1] is not None:
            self._categories.add(key[0])

    def vector(self, x: Mapping[Any, Any], row: int) -> npt.NDArray[np.float64]:
        """The row as [D].

        Args:
            x: feature → number, truth value, text or None.
            row: its number, for messages.

        Raises ValueError: NaN unless imputed, an infinite number, a text where numbers were.
        """
        simple = self._simple(x)
        if simple is not None:
            return simple
        values_D = np.array([math.nan if value is None else 0.0 for _, value in self.names])
        for key, value in self._values(x, row).items():
            if key in self._at:
                values_D[self._at[key]] = value
        return values_D

    def _simple(self, x: Mapping[Any, Any]) -> npt.NDArray[np.float64] | None:
        """The vector where every feature is there and a finite number, the case that must be fast."""
        if self._categories or len(x) != len(self.names) or not x:
            return None
        try:
            values_D = np.array([x[name] for name, _ in self.names])
        except KeyError:
            return None
        if values_D.dtype.kind not in "fiub":
            return None
        values_D = values_D.astype(np.float64, copy=False)
        return values_D if math.isfinite(values_D.sum()) else None

    def _values(self, x: Mapping[Any, Any], row: int) -> dict[tuple[Any, str | None], float]:
        values = {}
        for name, value in x.items():
            key = self._key((name, value))
            if key is None:
                continue
            if key[1] is not None:
                if (name, None) in self._at:
                    raise ValueError(f"row {row}: feature {name!r} is {value!r}; it was a number before")
                values[key] = 1.0
            elif math.isnan(value):
                if not self.impute:
                    raise ValueError(
                        f"row {row}: feature {name!r} is nan; leave it out, or use impute=True to take the "
                        "mean instead"
                    )
            elif math.isinf(value):
                raise ValueError(f"row {row}: feature {name!r} is {value}; should be a finite number")
            else:
                values[key] = float(value)
        return values

    def _key(self, item: tuple[Any, Any]) -> tuple[Any, str | None] | None:
        name, value = item
        if value is None:
            return None
        number = isinstance(value, int | float | np.number | np.bool_)
        if name in self._categories:
            return None if number and math.isnan(value) else (name, as_text(value))
        return (name, None) if number else (name, as_text(value))


def rows_of(
    X: "pd.DataFrame | npt.ArrayLike", before: Sequence[Any] | None = None, row: int = 0
) -> tuple[list[dict[Any, Any]], list[Any]]:
    """A frame's or an array's rows as dicts, and the names of its features.

    Args:
        X: the table; an array's features are named 0, 1, …
        before: the features of the table before; None for the first one.
        row: number of its first row, for messages.

    Raises ValueError for an array that is not [rows, features], a column's name that is there twice, or other
    features than before.

    >>> rows_of(np.array([[1.0, 2.0]]))
    ([{0: 1.0, 1: 2.0}], [0, 1])
    """
    if hasattr(X, "columns"):
        names = list(X.columns)
        if len(set(names)) < len(names):
            raise ValueError(f"two columns of one name among {names[:20]}")
        rows = records(X)
    else:
        array = np.asarray(X)
        if array.ndim != 2:
            raise ValueError(f"an array of shape {array.shape}; should be [rows, features]")
        names = list(range(array.shape[1]))
        rows = [dict(zip(names, values, strict=True)) for values in array.tolist()]
    if before is not None and set(names) != set(before):
        raise ValueError(
            f"row {row}: {len(names)} features {names[:20]}; there were {len(before)} before: {before[:20]}"
        )
    return rows, names
