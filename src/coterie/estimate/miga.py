"""`coterie fit miga`: a panel of instruments by day, learned from its first days and tested on its last."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.data import check_columns, panel_frame, purged_splits, read_table
from coterie.estimate.columns import Columns
from coterie.estimate.run import Fitted
from coterie.finance.backtest import ic_report, topn_backtest
from coterie.finance.miga import MIGARegressor

if TYPE_CHECKING:
    import pandas as pd

NEEDS = ("target", "time", "group")
TAKES = ("features",)
OPTIONS = MIGARegressor


def fit(data: Path, columns: Columns, options: dict[str, Any]) -> Fitted:
    """Learns from the first 60% of days, chooses the epoch by the next 15%, measures on the rest.

    With prices as target, the report also says what holding the best tenth of the names would have earned,
    bought at the next close and sold at the one after, without costs.

    Raises ValueError for several targets, and for what `MIGARegressor` refuses.
    """
    if len(columns.target) != 1:
        raise ValueError(f"miga predicts one target; got {', '.join(columns.target)}")
    if "target" in options:
        raise ValueError("name the target with --target COLUMN, not with --set")
    panel = _panel(data, columns)
    chosen = list(columns.features) or None
    if chosen is not None:
        check_columns(panel, chosen, str(data))
    model = MIGARegressor(columns.target[0], features=chosen, **options)
    horizon = model.horizon
    days = panel.index.get_level_values(0).unique()
    usable = len(days) - 2 * horizon
    valid, test = int(0.15 * usable), int(0.25 * usable)
    sizes = {"train": usable - valid - test, "valid": valid, "test": test}
    split = purged_splits(days, **sizes, gap=horizon, horizon=horizon)[0]
    model.fit(panel.loc[: split.train[-1]], panel.loc[: split.valid[-1]])
    score = model.predict(panel).loc[split.test[0] :]
    label = model.reader().label(panel)
    report: dict[str, float | int | str] = {
        "training days": len(split.train),
        "test days from": str(split.test[0]).removesuffix(" 00:00:00"),
        **ic_report(score, label),
        "epochs": len(model.history_.loss),
    }
    if model.target_is != "return" and horizon == 1:
        names = max(1, int(score.groupby(level=0).size().mean() / 10))
        traded = topn_backtest(score, label, names)
        report["names held"] = names
        report["excess return a year"] = traded.excess_return
        report["turnover a day"] = traded.turnover
    return Fitted(model, report, {"gate": model.expert_usage_})


def predict(folder: Path, data: Path, columns: Columns) -> Iterator["pd.DataFrame"]:
    """One frame: time, instrument and score of every row that ends a window."""
    score = MIGARegressor.load(folder).predict(_panel(data, columns))
    yield score.rename_axis([columns.time, columns.group]).reset_index()


def _panel(data: Path, columns: Columns) -> "pd.DataFrame":
    return panel_frame(read_table(data), time=columns.time, group=columns.group)
