"""Rows of a file one by one, in the file's order: CSV and the like, and ARFF."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.data.arff import arff_chunks
from coterie.data.tables import check_columns, import_pandas, table_chunks

if TYPE_CHECKING:
    import pandas as pd


def read_stream(
    path: str | Path, label: str | None = None, *, features: Sequence[str] = (), rows_at_once: int = 4096
) -> Iterator[tuple[dict[str, Any], Any]]:
    """(features, label) of every row, never shuffled, never more than a chunk in memory.

    Args:
        path: .arff, or a table that `read_table` reads.
        label: its column; None for the last one.
        features: columns to keep; empty for all others.
        rows_at_once: rows in memory.

    Returns: dicts of numbers and texts, missing texts None, missing numbers NaN; labels as they are.

    Raises ValueError: no such column, a missing label (which row), a file that cannot be read.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "weather.arff"
    >>> _ = file.write_text("@attribute sky {sun}\\n@attribute play {no,yes}\\n@data\\nsun,yes\\n")
    >>> list(read_stream(file))
    [({'sky': 'sun'}, 'yes')]
    """
    for frame in stream_chunks(path, rows_at_once):
        target = str(frame.columns[-1]) if label is None else label
        check_columns(frame, [target, *features], str(path))
        missing = frame[target].isna().to_numpy().nonzero()[0]
        if len(missing):
            row = frame.index[missing[0]]
            raise ValueError(f"{path}: column {target!r}, row {row}: the label is missing; drop such rows")
        kept = list(features) or [name for name in frame.columns if name != target]
        yield from zip(records(frame[kept]), frame[target].tolist(), strict=True)


def stream_chunks(path: str | Path, rows: int) -> "Iterator[pd.DataFrame]":
    """A table or an ARFF file in frames of at most `rows` rows, in order, numbered through.

    Raises ValueError as `read_table` does, and for ARFF that breaks its own header (which line).
    """
    if Path(path).suffix == ".arff":
        yield from arff_chunks(path, rows)
        return
    at = 0
    for frame in table_chunks(path, rows):
        frame.index = import_pandas().RangeIndex(at, at + len(frame))
        at += len(frame)
        yield frame


def records(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    """A frame's rows as dicts: numbers and truth values as float, missing ones NaN; missing texts None."""
    is_number = import_pandas().api.types.is_numeric_dtype
    columns = []
    for name in frame.columns:
        column = frame[name]
        if is_number(column.dtype):
            columns.append(column.to_numpy(dtype=float, na_value=math.nan).tolist())
        else:
            columns.append(column.astype(object).where(column.notna(), None).tolist())
    return [dict(zip(frame.columns, row, strict=True)) for row in zip(*columns, strict=True)]
