import numpy as np
import pandas as pd
import pytest

from coterie.finance.backtest import daily_ic, ic_report, paired_day_test, topn_backtest


def series(days=20, names=12, seed=0):
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product([range(days), [f"n{i:02d}" for i in range(names)]])
    return pd.Series(rng.normal(size=len(index)), index)


def test_daily_correlations_are_pandas_own():
    score, label = series(), (0.5 * series() + series(seed=1)).round(1)  # rounded: ranks with ties
    table = daily_ic(score, label)
    for day in range(20):
        assert table["ic"][day] == pytest.approx(score[day].corr(label[day]))
        by_rank = score[day].rank().corr(label[day].rank())
        assert table["rank_ic"][day] == pytest.approx(by_rank)


def test_days_that_say_nothing_are_skipped_and_counted():
    score, label = series(), series(seed=1)
    label.loc[3] = 0.5  # constant
    label.loc[4, "n00":"n07"] = np.nan  # four names left
    score.loc[5] = 1.0
    report = ic_report(score, label)
    assert (report["days"], report["days skipped"]) == (17, 3)
    rest = daily_ic(score, label)["ic"]
    assert report["IC"] == pytest.approx(rest.mean())
    assert report["ICIR"] == pytest.approx(rest.mean() / rest.std(ddof=0))
    with pytest.raises(ValueError, match="do their indices agree"):
        ic_report(score, label.rename(index=lambda name: f"{name}.US", level=1))


def by_hand(score, returns, n, cost):
    """Weights, drift and costs, one name after the other."""
    held, rows = {}, []
    for day in score.index.get_level_values(0).unique():
        best = sorted(score[day].index, key=lambda name: (-score[day][name], name))[:n]
        target = {name: 1 / len(best) for name in best}
        traded = sum(abs(target.get(k, 0) - held.get(k, 0)) for k in {*target, *held})
        earned = {k: w * (0 if np.isnan(returns[day, k]) else returns[day, k]) for k, w in target.items()}
        gross = sum(earned.values())
        rows.append((gross - cost / 1e4 * traded, traded / (2 if held else 1)))
        held = {k: (w + earned[k]) / (1 + gross) for k, w in target.items()}
    return np.array(rows)


def test_a_backtest_is_the_loop_by_hand():
    score, returns = series(), 0.02 * series(seed=1)
    returns.iloc[::7] = np.nan
    test = topn_backtest(score, returns, n=3, cost_bps=10)
    expected = by_hand(score, returns, 3, 10)
    np.testing.assert_allclose(test.daily[["return", "turnover"]].to_numpy(), expected)
    excess = test.daily["return"] - returns.groupby(level=0).mean()
    assert test.excess_return == pytest.approx(252 * excess.mean())
    assert test.information_ratio == pytest.approx(excess.mean() / excess.std(ddof=0) * 252**0.5)
    wealth = [1.0, *(1 + excess).cumprod()]
    deepest = min(w / max(wealth[: i + 1]) - 1 for i, w in enumerate(wealth))
    assert test.max_drawdown == pytest.approx(deepest)
    assert test.turnover == pytest.approx(expected[:, 1].mean())


def test_scores_that_never_change_trade_only_what_drifted():
    score = series(days=1)
    score = pd.concat([score.rename(index={0: day}, level=0) for day in range(10)])
    still = topn_backtest(score, 0 * score, n=4, cost_bps=50)
    assert still.daily["turnover"].tolist() == pytest.approx([1] + 9 * [0])
    assert still.daily["return"].tolist() == pytest.approx([-0.005] + 9 * [0])


def test_perfect_foresight_earns_and_its_mirror_loses():
    returns = 0.01 * series(days=60)
    assert topn_backtest(returns, returns, n=3).excess_return > 1
    assert topn_backtest(-returns, returns, n=3).excess_return < -1


def test_a_name_is_chosen_without_knowing_whether_it_will_have_a_return():
    score, returns = series(), 0.01 * series(seed=1)
    best = score[0].idxmax()
    returns.loc[(0, best)] = np.nan
    held = topn_backtest(score, returns, n=1)
    assert held.daily["return"].iloc[0] == 0


def test_an_index_of_ones_own_is_what_excess_is_over():
    score, returns = series(), 0.01 * series(seed=1)
    index = pd.Series(0.001, range(20))
    test = topn_backtest(score, returns, n=12, index=index)
    assert test.excess_return == pytest.approx(252 * (returns.mean() - 0.001))
    with pytest.raises(ValueError, match="the index has no return on 7"):
        topn_backtest(score, returns, n=2, index=index.drop(7))
    for wrong in ({"n": 0}, {"cost_bps": -1.0}):
        with pytest.raises(ValueError, match="at least one name"):
            topn_backtest(score, returns, **wrong)
    with pytest.raises(ValueError, match="no scores to trade on"):
        topn_backtest(score * np.nan, returns)


def test_the_paired_test_keeps_its_level_under_noise_that_is_correlated_over_days():
    rng, rejected = np.random.default_rng(0), 0
    for _ in range(200):
        noise = rng.normal(size=503)
        moving = pd.Series(noise[:-3] + noise[1:-2] + noise[2:-1] + noise[3:])
        rejected += paired_day_test(moving, 0 * moving, lags=10)[1] < 0.05
    assert 4 <= rejected <= 24  # 10 expected; without correction about 60
    with pytest.raises(ValueError, match="12 days in common"):
        paired_day_test(moving[:12], 0 * moving)
