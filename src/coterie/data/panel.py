"""Panels: many instruments over time, as tables; what is known of each on a day, and what came after.

A panel is a DataFrame whose index has two levels, time and instrument, in either order: what Qlib's handlers
and `D.features` give. Time is a date or a whole number. `panel_frame` brings what users have into that form.
Nothing here lets a day see a later one.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.data.tables import check_columns, import_pandas

if TYPE_CHECKING:
    import pandas as pd


def panel_frame(
    table: "pd.DataFrame", *, time: str | None = None, group: str | None = None
) -> "pd.DataFrame":
    """The table as a panel: index (time, instrument), sorted by both, one level of columns.

    Args:
        table: a flat table with `time` and `group` columns, or a frame with a two-level index. Columns of two
            levels, as Qlib's ("feature", "KMID") and ("label", "LABEL0"), lose the first; a single label
            column is then called "label".
        time: column or index level of dates (text is parsed) or whole numbers.
        group: that of instruments.

    Raises:
        ValueError: no such columns; an index that is no (time, instrument); dates that cannot be read, are
            missing, or mix time zones; an instrument whose dates go backwards; a row that comes twice.

    >>> pd = import_pandas()
    >>> table = pd.DataFrame({"day": ["2024-01-03", "2024-01-02"], "name": ["B", "A"], "x": [1.0, 2.0]})
    >>> panel_frame(table, time="day", group="name").index.tolist()
    [(Timestamp('2024-01-02 00:00:00'), 'A'), (Timestamp('2024-01-03 00:00:00'), 'B')]
    """
    pd = import_pandas()
    if time is not None and group is not None:
        if {time, group} <= set(table.index.names):
            table = table.reset_index()
        check_columns(table, [time, group])
        frame = table.drop(columns=[time, group])
        dates, instruments = table[time], table[group]
    else:
        if table.index.nlevels != 2:
            raise ValueError(
                f"the panel's index has {table.index.nlevels} level; should be (date, instrument): name the "
                "columns of time and group, or use set_index"
            )
        frame, levels = table.copy(deep=False), [table.index.get_level_values(i) for i in (0, 1)]
        dated = [isinstance(level, pd.DatetimeIndex) for level in levels]
        first = 1 if dated == [False, True] else 0
        dates, instruments = levels[first], levels[1 - first]
        time, group = (table.index.names[i] for i in (first, 1 - first))
    frame.columns = _one_level(frame.columns)
    parsed = _dates(dates)
    if parsed.isna().any() or pd.isna(instruments).any():
        row = int(np.flatnonzero(np.asarray(parsed.isna()) | np.asarray(pd.isna(instruments)))[0])
        raise ValueError(f"row {row} (counted from 0) has no date or no instrument")
    frame.index = pd.MultiIndex.from_arrays(
        [parsed, instruments], names=[time or "date", group or "instrument"]
    )
    _check_order(frame.index)
    return frame.sort_index()


def forward_return(close: "pd.Series[Any]", horizon: int = 1) -> "pd.Series[Any]":
    """What is earned by buying at the next day's close and selling `horizon` days later.

    close[t + 1 + horizon] / close[t + 1] - 1, days counted in the panel's own calendar; missing where either
    price is.

    Args:
        close: prices, indexed by (time, instrument).
        horizon: days held, at least 1.

    Raises ValueError for a horizon below 1, and for a price that is not above 0 (which day and instrument).

    >>> pd = import_pandas()
    >>> index = pd.MultiIndex.from_product([range(4), ["A"]])
    >>> forward_return(pd.Series([1.0, 2.0, 3.0, 6.0], index)).tolist()
    [0.5, 1.0, nan, nan]
    """
    if horizon < 1:
        raise ValueError(f"horizon={horizon}; should be at least 1 day")
    wrong = close.index[(close <= 0).to_numpy()]
    if len(wrong):
        raise ValueError(f"price {close[wrong[0]]} at {_shown(wrong[0])}; should be above 0, or missing")
    by_day = close.unstack()
    earned = by_day.shift(-1 - horizon) / by_day.shift(-1) - 1
    return _as_rows(earned, close.index)


def robust_zscore_by_day(values: "pd.DataFrame", clip: float = 3.0) -> "pd.DataFrame":
    """Each column minus the day's median, over the day's 1.4826 · median absolute deviation.

    Where that deviation is 0 the standard deviation takes its place, and a constant day becomes 0.

    Args:
        values: indexed by (time, instrument).
        clip: the largest absolute value left.

    >>> pd = import_pandas()
    >>> day = pd.MultiIndex.from_product([[0], list("abcde")])
    >>> robust_zscore_by_day(pd.DataFrame({"x": [1.0, 2, 3, 4, 500]}, day))["x"].round(2).tolist()
    [-1.35, -0.67, 0.0, 0.67, 3.0]
    """
    centred = values - values.groupby(level=0).transform("median")
    days = centred.groupby(level=0)
    robust = centred.abs().groupby(level=0).transform("median") * 1.4826
    scale = robust.where(robust > 0, days.transform("std", ddof=0))
    return (centred / scale.where(scale > 0, 1.0)).clip(-clip, clip)


def daily_features(panel: "pd.DataFrame", names: list[str]) -> "pd.DataFrame":
    """The feature columns as a model takes them: scored within their day, without gaps, as float32.

    A row without any feature counts as absent and is left out, so that no window crosses it. Where only some
    are missing, they become the day's median, which is 0.

    Args:
        panel: what `panel_frame` returns.
        names: the feature columns.

    Raises ValueError: a missing column, text or an infinite number in one (which row), or one that is missing
    for every instrument of a day, so that no median can stand in for it.
    """
    check_columns(panel, names, "the panel")
    values = panel[names]
    for name in names:
        column = values[name]
        if not import_pandas().api.types.is_numeric_dtype(column.dtype):
            raise ValueError(f"feature {name!r} holds {column.dtype}; should be numbers (or leave it out)")
        infinite = np.flatnonzero(np.isinf(column.to_numpy(dtype=np.float64, na_value=np.nan)))
        if len(infinite):
            raise ValueError(f"feature {name!r} is infinite at {_shown(panel.index[infinite[0]])}")
    values = values.astype(np.float64).dropna(how="all")
    known = values.notna().groupby(level=0).any()
    if not known.all(axis=None):
        gone = [name for name in names if not known[name].all()]
        day = known.index[~known[gone].all(axis=1)][0]
        raise ValueError(
            f"no instrument has {', '.join(map(repr, gone))} on {_day(day)}; leave such days or columns out"
        )
    return robust_zscore_by_day(values).fillna(0.0).astype(np.float32)


def _as_rows(by_day: "pd.DataFrame", index: "pd.Index[Any]") -> "pd.Series[Any]":
    """A table [days, instruments] as a column over the rows of `index`."""
    rows = by_day.index.get_indexer(index.get_level_values(0))
    columns = by_day.columns.get_indexer(index.get_level_values(1))
    return import_pandas().Series(by_day.to_numpy()[rows, columns], index)


def _one_level(columns: "pd.Index[Any]") -> list[str]:
    if columns.nlevels == 1:
        names = [str(name) for name in columns]
    else:
        labels = sum(first == "label" for first, *_ in columns)
        names = ["label" if c[0] == "label" and labels == 1 else str(c[-1]) for c in columns]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two columns are named {min(twice)!r}")
    return names


def _dates(values: Any) -> Any:
    pd = import_pandas()
    values = pd.Index(values)
    if isinstance(values, pd.DatetimeIndex) or pd.api.types.is_integer_dtype(values.dtype):
        return values
    try:
        return pd.DatetimeIndex(pd.to_datetime(values))
    except (ValueError, TypeError) as error:
        raise ValueError(f"dates cannot be read, or mix time zones: {error}") from None


def _check_order(index: "pd.Index[Any]") -> None:
    twice = index[index.duplicated()]
    if len(twice):
        some = ", ".join(_shown(row) for row in twice[:3])
        raise ValueError(f"{len(twice)} rows come twice, such as {some}; keep one of each")
    dates = index.get_level_values(0).to_series().reset_index(drop=True)
    backwards = dates.groupby(np.asarray(index.get_level_values(1), dtype=object)).diff().to_numpy()
    zero = np.timedelta64(0) if backwards.dtype.kind == "m" else 0
    wrong = index[backwards < zero]
    if len(wrong):
        raise ValueError(f"the dates of an instrument go backwards at {_shown(wrong[0])}; sort by date")


def _shown(row: Any) -> str:
    return f"({_day(row[0])}, {row[1]})"


def _day(day: Any) -> str:
    return str(day.date()) if hasattr(day, "date") and day == day.normalize() else str(day)
