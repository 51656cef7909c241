"""Tables of what users did: one column per task, 0, 1 or missing."""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from coterie.data import import_pandas

if TYPE_CHECKING:
    import pandas as pd


def as_frame(table: Any) -> "pd.DataFrame":
    """A DataFrame, or an array as one, whose columns are named by texts."""
    pd = import_pandas()
    frame = table.copy(deep=False) if isinstance(table, pd.DataFrame) else pd.DataFrame(table)
    frame.columns = [str(name) for name in frame.columns]
    return frame


def binary_labels(labels: "pd.DataFrame", rows: int) -> Tensor:
    """Labels [rows, tasks] of 0, 1 and NaN.

    Raises ValueError for another number of rows, no task, or another value (its column and row are named).
    Warns about a task whose labels are all alike.
    """
    if len(labels) != rows or not len(labels.columns):
        raise ValueError(
            f"{len(labels)} rows and {len(labels.columns)} columns of labels for {rows} rows; "
            "give one column per task, NaN where it has no label"
        )
    for name in labels.columns:
        column = import_pandas().to_numeric(labels[name], errors="coerce")
        wrong = ((column.isna() & labels[name].notna()) | (column.notna() & ~column.isin([0, 1]))).to_numpy()
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"label column {name!r}, row {labels.index[row]}: {labels[name].tolist()[row]!r}; "
                "should be 0, 1 or missing"
            )
        if column.nunique() < 2:
            warnings.warn(f"all labels of {name!r} are alike; there is nothing to learn", stacklevel=3)
    return torch.tensor(labels.astype(float).to_numpy(dtype=np.float32, na_value=np.nan))
