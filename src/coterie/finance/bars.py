"""Features from daily bars: open, high, low, close and volume."""

from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.data import check_columns, import_pandas

if TYPE_CHECKING:
    import pandas as pd

PRICES = ("open", "high", "low", "volume")
"""The columns that bars have beside the closing price."""


def bar_features(panel: "pd.DataFrame", *, close: str = "close") -> "pd.DataFrame":
    """Nine features of each row from its own day and the 20 before it.

    Returns over 1, 5 and 20 days; the deviation of 20 daily returns; close over its mean of 20 days; the
    day's range over its close; where in the range it closed (0 at the low, 1 at the high); open over the
    close before, missing where the open is 0 or missing; and the log of volume over its mean of 20 days.

    Args:
        panel: indexed by (time, instrument), with columns open, high, low, volume and the closing price.
        close: its name.

    Returns: rows that have all features but perhaps the open's; an instrument's first 20 days, and the 20
    after a missing day, are not among them.

    Raises ValueError: a missing column, or a close that is not above 0.

    >>> pd = import_pandas()
    >>> index = pd.MultiIndex.from_product([range(21), ["A"]])
    >>> bars = pd.DataFrame({name: range(1, 22) for name in (*PRICES, "close")}, index, dtype=float)
    >>> bar_features(bars).round(2).iloc[0].tolist()
    [0.05, 0.31, 20.0, 0.22, 1.83, 0.0, 0.5, 0.05, 0.57]
    """
    check_columns(panel, [*PRICES, close], "the panel")
    wrong = panel.index[(panel[close] <= 0).to_numpy()]
    if len(wrong):
        raise ValueError(f"column {close!r} holds {panel[close][wrong[0]]} at {wrong[0]}; should be above 0")
    by_day = {name: panel[name].astype(float).unstack() for name in (*PRICES, close)}
    price, high, low, volume = by_day[close], by_day["high"], by_day["low"], by_day["volume"]
    returns = price / price.shift(1) - 1
    spread = (high - low).where(high > low)
    opened = by_day["open"].where(by_day["open"] > 0)
    tables = {
        "return 1": returns,
        "return 5": price / price.shift(5) - 1,
        "return 20": price / price.shift(20) - 1,
        "deviation 20": returns.rolling(20).std(ddof=0),
        "close over mean 20": price / price.rolling(20).mean(),
        "range": (high - low) / price,
        "close in range": ((price - low) / spread).where(spread.notna(), 0.5 + 0 * price),
        "open over last close": opened / price.shift(1) - 1,
        "volume over mean 20": np.log1p(volume) - np.log1p(volume.rolling(20).mean()),
    }
    columns = {name: _rows(table, panel.index) for name, table in tables.items()}
    features = import_pandas().DataFrame(columns, panel.index)
    return features.dropna(subset=[name for name in tables if name != "open over last close"])


def _rows(by_day: "pd.DataFrame", index: "pd.Index[Any]") -> Any:
    rows = by_day.index.get_indexer(index.get_level_values(0))
    columns = by_day.columns.get_indexer(index.get_level_values(1))
    return by_day.to_numpy()[rows, columns]
