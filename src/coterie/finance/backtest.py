"""How good scores of a cross-section are: information coefficients by day, and what trading them earns."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.data import import_pandas
from coterie.finance.losses import MIN_NAMES

if TYPE_CHECKING:
    import pandas as pd

TRADING_DAYS = 252


def daily_ic(score: "pd.Series[Any]", label: "pd.Series[Any]") -> "pd.DataFrame":
    """Correlation of scores with labels, day by day.

    Args:
        score: indexed by (time, instrument).
        label: what came after; rows without a label, or without a score, are left out.

    Returns: one row per day with columns "ic" (Pearson) and "rank_ic" (Spearman). Days with fewer than 5
    names, constant scores or constant labels are left out.

    >>> pd = import_pandas()
    >>> index = pd.MultiIndex.from_product([[0, 1], list("abcde")])
    >>> score = pd.Series([1.0, 2, 3, 4, 5] * 2, index)
    >>> daily_ic(score, score**3)["rank_ic"].tolist()
    [1.0, 1.0]
    """
    pd = import_pandas()
    both = pd.DataFrame({"score": score, "label": label.reindex(score.index)}).dropna()
    days = both.groupby(level=0)
    both = both[days["score"].transform("size") >= MIN_NAMES]
    table = {
        "ic": _correlation_by_day(both),
        "rank_ic": _correlation_by_day(both.groupby(level=0).rank()),
    }
    return pd.DataFrame(table).dropna()


def ic_report(score: "pd.Series[Any]", label: "pd.Series[Any]") -> dict[str, float]:
    """Means of the daily IC and rank IC, and both over their standard deviation.

    Args:
        score: indexed by (time, instrument).
        label: what came after.

    Returns: "IC", "rank IC", "ICIR", "rank ICIR" (mean over deviation, per day, not annualised), "days", and
    "days skipped".

    Raises ValueError where no day has 5 names with a score and a label.
    """
    table = daily_ic(score, label)
    if not len(table):
        raise ValueError(
            f"no day has {MIN_NAMES} instruments with both a score and a label that vary; "
            f"got {len(score)} scores and {len(label)} labels: do their indices agree?"
        )
    mean, deviation = table.mean(), table.std(ddof=0)
    return {
        "IC": float(mean["ic"]),
        "rank IC": float(mean["rank_ic"]),
        "ICIR": float(mean["ic"] / max(deviation["ic"], 1e-12)),
        "rank ICIR": float(mean["rank_ic"] / max(deviation["rank_ic"], 1e-12)),
        "days": float(len(table)),
        "days skipped": float(score.index.get_level_values(0).nunique() - len(table)),
    }


@dataclass(frozen=True)
class Backtest:
    """What holding the top names earned.

    Args:
        daily: per day "return" of the portfolio after costs, "index" return, and one-way "turnover".
        annual_return: compounded, after costs.
        excess_return: mean daily excess over the index, times 252.
        information_ratio: mean over deviation of the daily excess, times √252.
        max_drawdown: deepest fall of the compounded excess from its peak, ≤ 0.
        turnover: mean share of the portfolio replaced per day, one way; the purchase on the first day
            counts.
    """

    daily: "pd.DataFrame"
    annual_return: float
    excess_return: float
    information_ratio: float
    max_drawdown: float
    turnover: float


def topn_backtest(
    score: "pd.Series[Any]",
    returns: "pd.Series[Any]",
    n: int = 30,
    cost_bps: float = 0.0,
    *,
    index: "pd.Series[Any] | None" = None,
) -> Backtest:
    """Holds the n best scored names of each day, equally weighted, and trades to them every day.

    Args:
        score: indexed by (time, instrument).
        returns: what a name earns while it is held for that day's score, over one day: for scores that are
            traded at the next close, `forward_return(close, 1)`. A missing one earns 0: whether a name will
            trade is not known when it is chosen.
        n: names held; all of them on a day that has fewer.
        cost_bps: cost of buying or of selling, in basis points of what is traded.
        index: return by day to compare with; None for the mean of all names that have a score that day.

    Returns: see `Backtest`. Weights drift with their returns between two days, and turnover is counted from
    there.

    Raises ValueError: n below 1, a negative cost, no scores, or days without an index return (which).

    >>> pd = import_pandas()
    >>> rows = pd.MultiIndex.from_product([[0, 1], ["A", "B"]])
    >>> test = topn_backtest(pd.Series([1.0, 0, 1, 0], rows), pd.Series([0.02, 0, 0.02, 0], rows), n=1)
    >>> test.daily["return"].tolist(), test.daily["turnover"].tolist()
    ([0.02, 0.02], [1.0, 0.0])
    """
    pd = import_pandas()
    if n < 1 or cost_bps < 0:
        raise ValueError(f"n={n}, cost_bps={cost_bps}; hold at least one name, at a cost of at least 0")
    score = score.dropna()
    if not len(score):
        raise ValueError("there are no scores to trade on")
    earned = returns.reindex(score.index)
    market = earned.groupby(level=0).mean().fillna(0.0) if index is None else index
    rows: list[tuple[Any, float, float, float]] = []
    held = pd.Series(dtype=float)
    for day, scores in score.groupby(level=0):
        # ties by name, so that equal scores do not depend on the order of rows
        best = scores.droplevel(0).sort_index().sort_values(ascending=False, kind="stable").index[:n]
        target = pd.Series(1 / len(best), best)
        traded = float(target.sub(held, fill_value=0.0).abs().sum())
        name_returns = earned.loc[[day]].droplevel(0)[best].fillna(0.0)
        gross = float(name_returns.mean())
        if day not in market.index or pd.isna(market[day]):
            raise ValueError(f"the index has no return on {day}")
        first = not rows  # buying from cash is one leg, replacing a name is two
        rows.append((day, gross - traded * cost_bps / 1e4, float(market[day]), traded / (1 if first else 2)))
        held = target * (1 + name_returns) / (1 + gross)
    table = pd.DataFrame(rows, columns=["day", "return", "index", "turnover"]).set_index("day")
    excess = table["return"] - table["index"]
    wealth = (1 + excess).cumprod()
    peak = wealth.cummax().clip(lower=1.0)
    deviation = float(excess.std(ddof=0))
    return Backtest(
        daily=table,
        annual_return=float((1 + table["return"]).prod() ** (TRADING_DAYS / len(table)) - 1),
        excess_return=float(excess.mean() * TRADING_DAYS),
        information_ratio=float(excess.mean() / max(deviation, 1e-12) * math.sqrt(TRADING_DAYS)),
        max_drawdown=float((wealth / peak - 1).min()),
        turnover=float(table["turnover"].mean()),
    )


def paired_day_test(ours: "pd.Series[Any]", theirs: "pd.Series[Any]", lags: int = 5) -> tuple[float, float]:
    """Is the mean of the daily difference 0? (mean difference, two-sided p) with Newey–West errors.

    Args:
        ours: a value per day, such as `daily_ic(...)["rank_ic"]`.
        theirs: the same of another model; days that both have are compared.
        lags: days over which differences may be correlated.

    Raises ValueError for fewer than 30 days in common, where the normal distribution is no good guide.

    Source: Newey and West 1987, Bartlett weights.

    >>> pd = import_pandas()
    >>> noise = pd.Series(np.random.default_rng(0).normal(size=400))
    >>> mean, p = paired_day_test(noise + 0.5, pd.Series(0.0, noise.index))
    >>> round(mean, 1), p < 1e-6
    (0.5, True)
    """
    difference = (ours - theirs).dropna().to_numpy()
    if len(difference) < 30:
        raise ValueError(f"{len(difference)} days in common; a paired test needs at least 30")
    mean = float(difference.mean())
    centred = difference - mean
    variance = float(centred @ centred)
    for lag in range(1, lags + 1):
        variance += 2 * (1 - lag / (lags + 1)) * float(centred[lag:] @ centred[:-lag])
    error = math.sqrt(max(variance, 1e-24)) / len(difference)
    return mean, math.erfc(abs(mean) / error / math.sqrt(2))


def _correlation_by_day(both: "pd.DataFrame") -> "pd.Series[Any]":
    """NaN where either side is constant."""
    centred = both - both.groupby(level=0).transform("mean")
    products = import_pandas().DataFrame(
        {
            "together": centred["score"] * centred["label"],
            "score": centred["score"] ** 2,
            "label": centred["label"] ** 2,
        }
    )
    sums = products.groupby(level=0).sum()
    scale = np.sqrt(sums["score"] * sums["label"])
    return sums["together"] / scale.where(scale > 1e-20)
