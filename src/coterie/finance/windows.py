"""What a model of stocks may see of a panel, and what it is asked: columns to windows and labels."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from coterie.data import (
    PanelWindows,
    check_columns,
    daily_features,
    forward_return,
    import_pandas,
    panel_frame,
)
from coterie.finance.bars import bar_features

if TYPE_CHECKING:
    import pandas as pd

TARGETS = ("return", "close", "bars")


@dataclass(frozen=True)
class WindowReader:
    """Reads panels, all in the same way.

    Args:
        target: column to learn from.
        target_is: what it holds, as in `MIGARegressor`.
        horizon: days that a label looks ahead after the day it is traded on.
        features: columns to predict from; None for every other numeric column.
        tradable: column that is true where an instrument may be held; None for all.
        window: days of a window.

    >>> from coterie.finance.style_panel import style_panel
    >>> panel, _ = style_panel(stocks=6, days=20)
    >>> train, valid = WindowReader().for_training(panel.loc[:9], panel.loc[:19])
    >>> train.days.tolist(), valid.days.tolist()
    ([4, 5, 6, 7, 8, 9], [11, 12, 13, 14, 15, 16, 17, 18, 19])
    """

    target: str = "label"
    target_is: Literal["return", "close", "bars"] = "return"
    horizon: int = 1
    features: list[str] | None = None
    tradable: str | None = None
    window: int = 5

    def for_training(self, panel: "pd.DataFrame", valid: "pd.DataFrame") -> tuple[PanelWindows, PanelWindows]:
        """Labelled windows of `panel`, and those of `valid` that no label of `panel` reaches into.

        Raises ValueError: what `panel_frame` and `daily_features` refuse, no labelled day in `panel`, no
        later one in `valid`, or two frames that count time differently.
        """
        frame, later = panel_frame(panel), panel_frame(valid)
        if _kind_of_time(frame) != _kind_of_time(later):
            raise ValueError(
                f"panel has times in {_kind_of_time(frame)}, valid in {_kind_of_time(later)}; should be alike"
            )
        names = self.feature_names(frame)
        train = self.windows(frame, names, label=self.label(frame))
        taught = train.days[[bool(train.labels(day).isfinite().any()) for day in range(len(train))]]
        if not len(taught):
            raise ValueError(f"no day of the panel has a window of {self.window} days and a label")
        days = later.index.get_level_values(0).unique()
        after = days[days > taught[-1]][self.horizon :]
        if not len(after):
            raise ValueError(
                f"leakage: the last training day is {taught[-1]} and its label reaches {self.horizon} days "
                f"further, but valid ends on {days[-1]}; give valid later days"
            )
        return train, self.windows(later, names, label=self.label(later), days=after)

    def windows(
        self, frame: "pd.DataFrame", names: list[str], *, label: Any = None, days: Any = None
    ) -> PanelWindows:
        """The windows of a frame that `panel_frame` gave, over the features `names`."""
        keep = None
        if self.tradable is not None:
            check_columns(frame, [self.tradable], "the panel")
            keep = frame[self.tradable].fillna(False).astype(bool)
        table = bar_features(frame, close=self.target) if self.target_is == "bars" else frame
        return PanelWindows(daily_features(table, names), self.window, label=label, keep=keep, days=days)

    def label(self, frame: "pd.DataFrame") -> "pd.Series[Any]":
        """What came after each row; NaN where the frame ends before that."""
        check_columns(frame, [self.target], "the panel")
        column = frame[self.target]
        if not import_pandas().api.types.is_numeric_dtype(column.dtype):
            raise ValueError(f"target {self.target!r} holds {column.dtype}; should be numbers")
        return column if self.target_is == "return" else forward_return(column, self.horizon)

    def feature_names(self, panel: "pd.DataFrame") -> list[str]:
        """The features that a panel has to offer. ValueError where there are none."""
        frame = panel_frame(panel)
        if self.target_is == "bars":
            return list(bar_features(frame.iloc[:0], close=self.target).columns)
        others = frame.drop(columns=[n for n in (self.target, self.tradable) if n in frame.columns])
        found = self.features or list(others.select_dtypes(["number", "bool"]).columns)
        if not found:
            raise ValueError(
                f"the panel has no numeric column beside {self.target!r} to predict from: "
                + ", ".join(map(repr, frame.columns))
            )
        return found


def _kind_of_time(frame: "pd.DataFrame") -> str:
    dtype = frame.index.levels[0].dtype
    return f"dates of time zone {getattr(dtype, 'tz', None)}" if dtype.kind == "M" else "whole numbers"
