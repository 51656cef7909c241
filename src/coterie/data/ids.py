"""Identifiers of users, items and the like as small whole numbers."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from coterie.data.tables import as_texts

if TYPE_CHECKING:
    import pandas as pd


class Vocabulary:
    """Numbers the values of a column from 1; 0 stands for one that is missing, rare, or seen later only.

    7, 7.0 and "7" are one value, see `as_texts`.

    Args:
        min_count: rarer values get 0, and so train what an unseen one is given.

    >>> import pandas as pd
    >>> vocabulary = Vocabulary(min_count=2).fit(pd.Series([7, 8, 7, None]))
    >>> vocabulary.encode(pd.Series(["7", "8", "9"])).tolist(), len(vocabulary)
    ([1, 0, 0], 2)
    """

    def __init__(self, *, min_count: int = 1) -> None:
        self.min_count = min_count
        self.values: list[str] = []

    def fit(self, column: "pd.Series[Any]") -> "Vocabulary":
        """Learns the values, in the order of their text."""
        counts = as_texts(column).value_counts()
        self.values = sorted(counts.index[counts >= self.min_count])
        return self

    def encode(self, column: "pd.Series[Any]") -> npt.NDArray[np.int64]:
        """int64 [rows], 0 … len(self) - 1."""
        numbers = {value: number for number, value in enumerate(self.values, 1)}
        codes: npt.NDArray[np.int64] = np.array(as_texts(column).map(numbers).fillna(0), dtype=np.int64)
        return codes

    def __len__(self) -> int:
        """Numbers in use, 0 included."""
        return len(self.values) + 1
