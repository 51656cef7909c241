"""ARFF, the format of Weka and MOA, read in chunks."""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.data.tables import import_pandas

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class _Attribute:
    name: str
    values: frozenset[str] | None  # of a nominal one
    numeric: bool

    def read(self, text: str, where: str) -> Any:
        if text == "?":
            return math.nan if self.numeric else None
        if self.numeric:
            try:
                return float(text)
            except ValueError:
                raise ValueError(f"{where}: {self.name} is {text!r}; should be a number") from None
        if self.values is not None and text not in self.values:
            raise ValueError(f"{where}: {self.name} is {text!r}, which its @attribute does not list")
        return text


def arff_chunks(path: str | Path, rows: int) -> "Iterator[pd.DataFrame]":
    """Frames of at most `rows` rows, in the file's order; numbers as float, everything else as text.

    Raises ValueError (which line): no such file, no rows, a sparse row, a value that its attribute forbids.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.arff"
    >>> _ = file.write_text("@attribute 'the x' real\\n@attribute y {0,1}\\n@data\\n2.5,1\\n?,0\\n")
    >>> [frame.to_dict("list") for frame in arff_chunks(file, 1)]
    [{'the x': [2.5], 'y': ['1']}, {'the x': [nan], 'y': ['0']}]
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give an .arff file")
    attributes: list[_Attribute] = []
    chunk: list[list[Any]] = []
    at, in_data = 0, False
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            line, where = line.strip(), f"{path}, line {number}"
            if not line or line.startswith("%"):
                continue
            if in_data:
                chunk.append(_row(line, attributes, where))
                if len(chunk) == rows:
                    yield _frame(chunk, attributes, at)
                    at, chunk = at + rows, []
            elif line.lower().startswith("@attribute"):
                attributes.append(_attribute(line[len("@attribute") :].strip(), where))
            elif line.lower() == "@data":
                in_data = True
    if chunk:
        yield _frame(chunk, attributes, at)
    elif not at:
        raise ValueError(f"{path} has no rows" + ("" if in_data else ": no @data line"))


def _frame(chunk: list[list[Any]], attributes: list[_Attribute], at: int) -> "pd.DataFrame":
    pandas, names = import_pandas(), [attribute.name for attribute in attributes]
    frame: pd.DataFrame = pandas.DataFrame(chunk, columns=names, index=pandas.RangeIndex(at, at + len(chunk)))
    return frame


def _attribute(text: str, where: str) -> _Attribute:
    """The declaration after "@attribute": a name, perhaps quoted, and a type."""
    if text[:1] in ("'", '"'):
        name, _, kind = text[1:].partition(text[0])
    else:
        name, _, kind = text.replace("\t", " ").partition(" ")
    kind = kind.strip()
    if kind.startswith("{") and kind.endswith("}"):
        return _Attribute(name, frozenset(_split(kind[1:-1])), numeric=False)
    if kind.lower().split()[:1] in (["numeric"], ["real"], ["integer"]):
        return _Attribute(name, None, numeric=True)
    if kind.lower().split()[:1] in (["string"], ["date"]):
        return _Attribute(name, None, numeric=False)
    raise ValueError(
        f"{where}: attribute {name!r} is of type {kind!r}; should be numeric, string, date or {{…}}"
    )


def _row(line: str, attributes: list[_Attribute], where: str) -> list[Any]:
    if line.startswith("{"):
        raise ValueError(f"{where}: a sparse row; write all values")
    texts = _split(line)
    if len(texts) != len(attributes):
        raise ValueError(f"{where}: {len(texts)} values for {len(attributes)} attributes")
    return [attribute.read(text, where) for attribute, text in zip(attributes, texts, strict=True)]


def _split(line: str) -> list[str]:
    quote = '"' if '"' in line else "'"
    return [text.strip() for text in next(csv.reader([line], quotechar=quote, skipinitialspace=True))]
