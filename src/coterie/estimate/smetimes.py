"""`coterie fit smetimes`: a table over time; predictions are the steps that follow the end of a table."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.data import read_table
from coterie.estimate.columns import Columns
from coterie.estimate.run import Fitted
from coterie.forecast.smetimes import SMETimesForecaster

if TYPE_CHECKING:
    import pandas as pd

NEEDS = ()
TAKES = ("time", "target")
OPTIONS = SMETimesForecaster


def fit(data: Path, columns: Columns, options: dict[str, Any]) -> Fitted:
    """Fits the first four fifths of a table and forecasts from every place in the last one.

    `time` is its time column, if it has one; `target` names the columns to forecast, all by default.

    Raises ValueError for what `SMETimesForecaster.fit` refuses.
    """
    table, model = read_table(data), SMETimesForecaster(**options)
    first_tested = len(table) - len(table) // 5
    model.fit(table[:first_tested], columns.time, list(columns.target) or None)
    errors = model.backtest(table[max(first_tested - model.seq_len, 0) :])
    report: dict[str, float | int | str] = {
        "rows fitted": first_tested,
        "rows tested": len(table) - first_tested,
        "horizon": model.horizon,
        "MSE, scaled": errors["mse"],
        "MAE, scaled": errors["mae"],
        "MSE of repeating the last day": errors["naive mse"],
        "MAE of repeating the last day": errors["naive mae"],
        "share of the prompt": model.prompt_share_,
    }
    usage = {"gate": model.expert_usage_.tolist()}
    return Fitted(model, report, usage)


def predict(folder: Path, data: Path, columns: Columns) -> "Iterator[pd.DataFrame]":
    """The steps that follow the last row of a table with the same columns."""
    yield SMETimesForecaster.load(folder).predict(read_table(data))
