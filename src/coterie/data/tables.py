"""Tables from files: one frame, or chunk by chunk; and what a model makes of their columns."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".txt": "\t"}


def import_pandas() -> Any:
    """The pandas module. ModuleNotFoundError naming the extra where it is not installed."""
    try:
        import pandas
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "tables need pandas; install it with: pip install 'coterie[tables]'"
        ) from None
    return pandas


def read_table(path: str | Path) -> "pd.DataFrame":
    """A CSV, TSV, RecBole `.inter` (types in its header are dropped) or Parquet file, .gz where it is text.

    Raises:
        ValueError: no such file, an unknown suffix, an unreadable or empty file, or two columns of one name.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "likes.inter"
    >>> _ = file.write_text("user_id:token\\trating:float\\n7\\t4\\n8\\t5\\n")
    >>> read_table(file).to_dict("list")
    {'user_id': [7, 8], 'rating': [4, 5]}
    """
    frames = list(table_chunks(path, None))
    return frames[0]


def table_chunks(path: str | Path, rows: int | None) -> "Iterator[pd.DataFrame]":
    """The same file in frames of at most `rows` rows, in order; None for one frame of everything.

    Raises as `read_table` does.
    """
    pd = import_pandas()
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a .csv, .tsv, .inter or .parquet file")
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    try:
        if kind == ".parquet":
            frames = _parquet_chunks(path, rows)
        elif kind in _SEPARATORS:
            read = pd.read_csv(path, sep=_SEPARATORS[kind], chunksize=rows, low_memory=False)
            frames = iter([read]) if rows is None else iter(read)
        else:
            raise ValueError(f"{path} ends in {path.suffix!r}; give a .csv, .tsv, .inter or .parquet file")
        empty = True
        for frame in frames:
            empty = empty and frame.empty
            if kind == ".inter":
                frame.columns = [str(name).split(":")[0] for name in frame.columns]
            twice = frame.columns[frame.columns.duplicated()]
            if len(twice):
                raise ValueError(f"{path} has two columns named {twice[0]!r}")
            yield frame
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as {kind[1:]}: {error}") from None
    if empty:
        raise ValueError(f"{path} has no rows")


def check_columns(frame: "pd.DataFrame", names: Sequence[str], where: str = "the table") -> None:
    """ValueError naming the columns that are missing, and the ones there are, unless all are there."""
    missing = [name for name in names if name not in frame.columns]
    if missing:
        there = ", ".join(map(str, frame.columns[:20])) + (", …" if len(frame.columns) > 20 else "")
        raise ValueError(f"{where} has no column {', '.join(map(repr, missing))}; it has {there}")


def as_texts(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Values as texts, None where missing: 7, 7.0 and "7" are "7".

    A column of whole numbers turns into floats where one of them is missing, in one file and not in the next.
    """
    pd = import_pandas()
    codes, values = pd.factorize(column)  # missing ones get -1
    texts = [as_text(value) for value in values]
    return pd.Series(np.array([*texts, None], dtype=object)[codes], index=column.index, dtype=object)


def as_text(value: Any) -> str:
    """One value as a text.

    >>> [as_text(value) for value in (7, 7.0, np.float32(7), "7", 7.5)]
    ['7', '7', '7', '7', '7.5']
    """
    whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value)) if whole else str(value)


class TableEncoder:
    """Turns a frame's columns into standardised float32 features, the same way for every later frame.

    Numbers (and truth values) are standardised with the mean and deviation of the frame it was fitted on; a
    missing one becomes the mean, and a column that missed some then gets a second feature that says so.
    Everything else is a category: one feature per value seen at least `min_count` times, all zero for a
    missing or an unseen one. The categories 7, 7.0 and "7" are one.

    Args:
        min_count: rarer categories count as unseen.
        max_categories: the most per column; a column with more distinct values is refused as an identifier.

    After `fit`: `columns`, the names it reads; `feature_names`, one per output; `source`, the input column of
    each output; `blocks`, the outputs of each column.

    >>> pd = import_pandas()
    >>> encoder = TableEncoder().fit(pd.DataFrame({"age": [20.0, 40.0, None], "job": ["a", "b", "a"]}))
    >>> encoder.feature_names
    ['age', 'age is missing', 'job=a', 'job=b']
    >>> encoder.blocks
    [[0, 1], [2, 3]]
    >>> encoder.transform(pd.DataFrame({"job": ["c"], "age": [40.0]})).tolist()
    [[1.0, 0.0, 0.0, 0.0]]
    >>> TableEncoder.from_dict(encoder.to_dict()).feature_names == encoder.feature_names
    True
    """

    def __init__(self, *, min_count: int = 1, max_categories: int = 200) -> None:
        self.min_count, self.max_categories = min_count, max_categories
        self._numbers: dict[str, tuple[float, float, bool]] = {}  # mean, deviation, has it missed some?
        self._categories: dict[str, list[str]] = {}
        self.columns: list[str] = []

    def fit(self, frame: "pd.DataFrame") -> "TableEncoder":
        """Learns columns, means, deviations and categories.

        Raises ValueError: no rows or columns, an infinite number (its column and row), or too many
        categories.
        """
        if not len(frame) or not len(frame.columns):
            raise ValueError(f"the table has {len(frame)} rows and {len(frame.columns)} feature columns")
        self._numbers, self._categories = {}, {}
        self.columns = [str(name) for name in frame.columns]
        for name in self.columns:
            if _is_number(frame[name]):
                values = _floats(frame, name)
                missing = np.isnan(values)
                known = values[~missing] if not missing.all() else np.zeros(1)
                self._numbers[name] = (float(known.mean()), float(known.std()) or 1.0, bool(missing.any()))
            else:
                counts = as_texts(frame[name]).value_counts()
                kept = sorted(counts.index[counts >= self.min_count])
                if len(kept) > self.max_categories:
                    raise ValueError(
                        f"column {name!r} has {len(kept)} categories, more than {self.max_categories}; "
                        "leave it out if it is an identifier or a text"
                    )
                self._categories[name] = kept
        return self

    @property
    def feature_names(self) -> list[str]:
        return [feature for _, features in self._features() for feature in features]

    @property
    def source(self) -> list[str]:
        return [name for name, features in self._features() for _ in features]

    @property
    def blocks(self) -> list[list[int]]:
        """For each column the places of its features."""
        source = self.source
        return [[j for j, name in enumerate(source) if name == column] for column in self.columns]

    def transform(self, frame: "pd.DataFrame") -> npt.NDArray[np.float32]:
        """Features [rows, len(feature_names)].

        Raises ValueError: a missing column, or text or an infinite number where numbers were (which row).
        """
        check_columns(frame, self.columns)
        parts = []
        for name in self.columns:
            if name in self._numbers:
                mean, deviation, flagged = self._numbers[name]
                values = _floats(frame, name)
                missing = np.isnan(values)
                parts.append(np.where(missing, 0.0, (values - mean) / deviation)[:, None])
                if flagged:
                    parts.append(missing[:, None])
            else:
                texts = as_texts(frame[name]).to_numpy(dtype=object)
                parts.append(texts[:, None] == np.array([*self._categories[name]], dtype=object)[None, :])
        return np.concatenate([np.zeros((len(frame), 0)), *parts], axis=1).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """What was learnt, as JSON can hold it."""
        return {
            "columns": self.columns,
            "numbers": {name: list(learnt) for name, learnt in self._numbers.items()},
            "categories": self._categories,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "TableEncoder":
        """The encoder of which this is the `to_dict`."""
        encoder = cls()
        encoder.columns = list(saved["columns"])
        encoder._numbers = {name: (m, d, bool(flag)) for name, (m, d, flag) in saved["numbers"].items()}
        encoder._categories = {name: list(kept) for name, kept in saved["categories"].items()}
        return encoder

    def _features(self) -> Iterator[tuple[str, list[str]]]:
        for name in self.columns:
            if name in self._numbers:
                yield name, [name, f"{name} is missing"] if self._numbers[name][2] else [name]
            else:
                yield name, [f"{name}={value}" for value in self._categories[name]]


def _parquet_chunks(path: Path, rows: int | None) -> "Iterator[pd.DataFrame]":
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "Parquet needs pyarrow; install it with: pip install 'coterie[tables]'"
        ) from None
    try:
        if rows is None:
            yield parquet.read_table(path).to_pandas()
            return
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=rows):
            yield batch.to_pandas()
    except ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from None


def _is_number(column: "pd.Series[Any]") -> bool:
    return bool(import_pandas().api.types.is_numeric_dtype(column.dtype))


def _floats(frame: "pd.DataFrame", name: str) -> npt.NDArray[np.float64]:
    pd = import_pandas()
    column = frame[name]
    if not _is_number(column):
        read = pd.to_numeric(column, errors="coerce")
        wrong = np.flatnonzero(read.isna().to_numpy() & column.notna().to_numpy())
        if len(wrong):
            row, found = frame.index[wrong[0]], column.iloc[wrong[0]]
            raise ValueError(f"column {name!r}, row {row}: {found!r} where a number should be")
        column = read
    values: npt.NDArray[np.float64] = column.to_numpy(dtype=np.float64, na_value=np.nan)
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        raise ValueError(
            f"column {name!r}, row {frame.index[infinite[0]]}: infinite; should be a finite number"
        )
    return values
