"""A table as series: checked numbers in order of time, on a regular grid."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from coterie.data import check_columns, import_pandas

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Series:
    """Columns of numbers over time.

    Args:
        values_TC: [rows, columns], finite.
        names: of the columns.
        times_T: datetime64[s] of the rows; None for a table without a time column.
        step: time from row to row as pandas writes it, such as "1h" or "MS"; "" without times.
    """

    values_TC: npt.NDArray[np.float64]
    names: list[str]
    times_T: npt.NDArray[np.datetime64] | None
    step: str

    def tail(self, rows: int) -> "Series":
        """The last rows."""
        times_T = None if self.times_T is None else self.times_T[-rows:]
        return Series(self.values_TC[-rows:], self.names, times_T, self.step)

    def times_until(self, later: int) -> npt.NDArray[np.datetime64] | None:
        """Times of the rows and of so many rows after them; None without times."""
        if self.times_T is None:
            return None
        return np.concatenate([self.times_T, later_times(self.times_T[-1], self.step, later)])


def steps_per_day(step: str) -> int | None:
    """How many steps a day has, such as 24 for "1h"; None where they do not divide it.

    >>> steps_per_day("1h"), steps_per_day("15min"), steps_per_day("MS"), steps_per_day("")
    (24, 96, None, None)
    """
    pd = import_pandas()
    offset = pd.tseries.frequencies.to_offset(step) if step else None
    if not isinstance(offset, pd.tseries.offsets.Tick):
        return None
    parts, rest = divmod(pd.Timedelta(1, "D"), pd.Timedelta(offset))
    return int(parts) if parts >= 2 and not rest else None


def later_times(last: np.datetime64, step: str, count: int) -> npt.NDArray[np.datetime64]:
    """The `count` times that follow `last`, datetime64[s].

    >>> later_times(np.datetime64("2020-01-31T23:00"), "1h", 2).astype(str).tolist()
    ['2020-02-01T00:00:00', '2020-02-01T01:00:00']
    """
    times = import_pandas().date_range(last, periods=count + 1, freq=step)[1:]
    return np.asarray(times, "datetime64[s]")


def read_series(frame: "pd.DataFrame", time_col: str | None, columns: Sequence[str] | None = None) -> Series:
    """Checks a table and takes its series.

    The step is inferred. Times that are missing from a regular grid are filled in by straight lines between
    their neighbours, with a warning that says how many.

    Args:
        frame: rows in order of time.
        time_col: column of times; None if there is none, and rows are then equally far apart.
        columns: of numbers; None for all but `time_col`.

    Raises ValueError, naming the column and the row: a missing column, a value that is no finite number, a
    time that is missing, unreadable, not after the one before it, or off the grid; fewer than 3 rows.

    >>> pd = import_pandas()
    >>> times = pd.date_range("2020-01-01", periods=4, freq="h")
    >>> series = read_series(pd.DataFrame({"date": times, "load": [1.0, 2, 3, 4]}), "date")
    >>> series.names, series.step, series.values_TC.shape
    (['load'], 'h', (4, 1))
    """
    if columns is not None and isinstance(columns, str):
        raise ValueError(f"columns={columns!r} is one text; give a list of names, [{columns!r}]")
    check_columns(frame, [*([] if time_col is None else [time_col]), *(columns or [])])
    names = list(columns) if columns is not None else [c for c in frame.columns if c != time_col]
    if not names:
        raise ValueError("the table has no columns to forecast beside its time column")
    if len(frame) < 3:
        raise ValueError(f"the table has {len(frame)} rows; should have at least 3")
    values_TC = np.stack([_numbers(frame, name) for name in names], 1)
    names = [str(name) for name in names]
    if time_col is None:
        return Series(values_TC, names, None, "")
    times = _times(frame, time_col)
    return _on_grid(values_TC, names, times, frame.index, time_col)


def _numbers(frame: "pd.DataFrame", name: str) -> npt.NDArray[np.float64]:
    pd = import_pandas()
    if pd.api.types.is_datetime64_any_dtype(frame[name].dtype):
        raise ValueError(f"column {name!r} holds times; name it as the time column, or leave it out")
    read = pd.to_numeric(frame[name], errors="coerce")
    values: npt.NDArray[np.float64] = read.to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        found = frame[name].iloc[wrong[0]]
        what = "missing" if pd.isna(found) else repr(found)
        raise ValueError(
            f"column {name!r}, row {frame.index[wrong[0]]}: {what} where a finite number should be; fill it, "
            "or leave the column out"
        )
    return values


def _times(frame: "pd.DataFrame", name: str) -> Any:
    pd = import_pandas()
    times = pd.to_datetime(frame[name], errors="coerce")
    unread = np.flatnonzero(times.isna().to_numpy())
    if len(unread):
        row, found = frame.index[unread[0]], frame[name].iloc[unread[0]]
        raise ValueError(
            f"column {name!r}, row {row}: {found!r} is no time; should be like 2016-07-01 00:00:00"
        )
    late = np.flatnonzero(times.diff().iloc[1:].to_numpy() <= np.timedelta64(0))
    if len(late):
        row, time = frame.index[late[0] + 1], times.iloc[late[0] + 1]
        wrong = "repeats" if time == times.iloc[late[0]] else "lies before"
        raise ValueError(
            f"column {name!r}, row {row}: {time} {wrong} the time of the row above; sort the table by "
            f"{name!r} and keep one row of each time"
        )
    return pd.DatetimeIndex(times)


def _on_grid(
    values_TC: npt.NDArray[np.float64], names: list[str], times: Any, index: Any, time_col: str
) -> Series:
    pd = import_pandas()
    step = pd.infer_freq(times)
    if step is not None:  # also months and business days, whose steps differ in length
        step = getattr(step, "freqstr", step)  # an offset from pandas 4 on
        return Series(values_TC, names, np.asarray(times, "datetime64[s]"), step)
    apart = pd.Series(times).diff().mode().iloc[0]
    off = np.flatnonzero((times - times[0]) % apart != pd.Timedelta(0))
    if len(off):
        raise ValueError(
            f"column {time_col!r}, row {index[off[0]]}: {times[off[0]]} is off the grid of steps of {apart} "
            f"from {times[0]}; resample the table to equal steps"
        )
    grid = pd.date_range(times[0], times[-1], freq=apart)
    missing = grid.difference(times)
    warnings.warn(
        f"{len(missing)} of {len(grid)} times are missing, the first is {missing[0]}; filled in by straight "
        "lines between their neighbours",
        UserWarning,
        stacklevel=4,
    )
    filled = pd.DataFrame(values_TC, index=times).reindex(grid).interpolate()
    return Series(filled.to_numpy(), names, np.asarray(grid, "datetime64[s]"), grid.freqstr)
