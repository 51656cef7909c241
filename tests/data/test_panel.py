import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.data import (
    PanelWindows,
    daily_features,
    forward_return,
    panel_frame,
    purged_splits,
    read_table,
    robust_zscore_by_day,
)


def random_panel(days=12, names=6, columns=("a", "b"), seed=0, missing=0.0):
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product(
        [pd.bdate_range("2024-01-01", periods=days), [f"n{i}" for i in range(names)]],
        names=["datetime", "instrument"],
    )
    frame = pd.DataFrame(rng.normal(size=(len(index), len(columns))), index, list(columns))
    return frame[rng.random(len(frame)) >= missing]


def test_every_form_of_the_same_panel_is_read_alike(tmp_path):
    frame = random_panel().assign(label=1.5)
    flat = frame.reset_index()
    texts = flat.assign(datetime=flat["datetime"].dt.strftime("%Y-%m-%d"))
    by_instrument = frame.swaplevel().sort_index()  # the order of Qlib's D.features
    grouped = frame.set_axis(
        pd.MultiIndex.from_tuples([("feature", "a"), ("feature", "b"), ("label", "LABEL0")]), axis=1
    )
    expected = panel_frame(frame)
    for other in (by_instrument, grouped):  # a handler's frame loads unchanged
        pd.testing.assert_frame_equal(panel_frame(other), expected, check_freq=False)
    for table in (flat, texts, frame, texts.sample(frac=1, random_state=0).sort_values("datetime")):
        read = panel_frame(table, time="datetime", group="instrument")
        pd.testing.assert_frame_equal(read, expected, check_freq=False, check_index_type=False)
    frame.to_parquet(tmp_path / "qlib.parquet")
    pd.testing.assert_frame_equal(
        panel_frame(read_table(tmp_path / "qlib.parquet")), expected, check_freq=False, check_index_type=False
    )


def test_what_is_no_panel_is_refused():
    frame = random_panel()
    flat = frame.reset_index()
    with pytest.raises(ValueError, match="2 rows come twice, such as \\(2024-01-01, n0\\)"):
        panel_frame(pd.concat([frame, frame.iloc[:2]]))
    last_day_third = [*range(12), *range(66, 72), *range(12, 66)]
    with pytest.raises(ValueError, match="go backwards at \\(2024-01-03, n0\\)"):
        panel_frame(frame.iloc[last_day_third])
    zones = [pd.Timestamp("2024-01-01", tz="UTC"), pd.Timestamp("2024-01-02", tz="Asia/Shanghai")]
    mixed = pd.DataFrame({"d": zones, "i": ["a", "b"]})
    with pytest.raises(ValueError, match="dates cannot be read, or mix time zones"):
        panel_frame(mixed, time="d", group="i")
    with pytest.raises(ValueError, match="dates cannot be read"):
        panel_frame(flat.assign(datetime="soon"), time="datetime", group="instrument")
    with pytest.raises(ValueError, match="no column 'ticker'; it has datetime, instrument, a, b"):
        panel_frame(flat, time="datetime", group="ticker")
    with pytest.raises(ValueError, match="index has 1 level"):
        panel_frame(flat)
    nameless = flat.assign(instrument=flat["instrument"].where(flat.index != 3))
    with pytest.raises(ValueError, match=r"row 3 .* has no date or no instrument"):
        panel_frame(nameless, time="datetime", group="instrument")
    with pytest.raises(ValueError, match="two columns are named 'a'"):
        panel_frame(frame.set_axis(["a", "a"], axis=1))


def test_a_return_is_earned_from_the_next_close_on_in_the_panels_calendar():
    index = pd.MultiIndex.from_product([range(5), ["A", "B"]])
    close = pd.Series([1.0, 10, 2, 20, 3, 60, 6, 60, 9, 90], index).drop((2, "B"))
    earned = forward_return(close, 2)
    assert earned.loc[(0, "A")] == 6 / 2 - 1
    assert earned.loc[(1, "A")] == 9 / 3 - 1
    assert earned.loc[(0, "B")] == 60 / 20 - 1
    assert earned.isna()[(1, "B")]  # no price on the day of buying
    assert earned.loc[2:].isna().all()  # the frame ends
    with pytest.raises(ValueError, match=r"price 0.0 at \(3, A\); should be above 0"):
        forward_return(close.mask(close.index == (3, "A"), 0.0))
    with pytest.raises(ValueError, match="horizon=0"):
        forward_return(close, 0)


def test_features_are_scored_with_their_own_day_only():
    frame, day = random_panel(), pd.Timestamp("2024-01-05")
    scored = robust_zscore_by_day(frame)
    one_day = frame.loc[[day], "a"]
    deviation = 1.4826 * (one_day - one_day.median()).abs().median()
    expected = ((one_day - one_day.median()) / deviation).clip(-3, 3)
    pd.testing.assert_series_equal(scored.loc[[day], "a"], expected)
    other = frame.copy()
    other.loc[other.index.get_level_values(0) != day] *= 100.0
    pd.testing.assert_frame_equal(robust_zscore_by_day(other).loc[[day]], scored.loc[[day]])


def test_columns_that_are_mostly_one_value_are_scaled_by_their_deviation_and_constant_ones_are_zero():
    index = pd.MultiIndex.from_product([[0], list("abcdef")])
    frame = pd.DataFrame({"flag": [0.0, 0, 0, 0, 0, 1], "constant": 7.0}, index)
    scored = robust_zscore_by_day(frame)
    assert scored["flag"].iloc[-1] == pytest.approx(1 / frame["flag"].std(ddof=0))
    assert (scored["constant"] == 0).all()


def test_missing_features_become_the_days_median_and_empty_rows_are_absent():
    frame = random_panel()
    frame.iloc[3, 0] = np.nan
    frame.iloc[7] = np.nan
    features = daily_features(frame, ["a", "b"])
    assert len(features) == len(frame) - 1
    assert frame.index[7] not in features.index
    assert features.iloc[3, 0] == 0
    assert not features.isna().any(axis=None)


def test_features_that_cannot_be_used_are_named():
    frame, day = random_panel(), pd.Timestamp("2024-01-03")
    gone = frame.copy()
    gone.loc[[day], "b"] = np.nan
    with pytest.raises(ValueError, match="no instrument has 'b' on 2024-01-03"):
        daily_features(gone, ["a", "b"])
    with pytest.raises(ValueError, match="feature 'a' is infinite at \\(2024-01-01, n2\\)"):
        daily_features(frame.mask(frame == frame.iloc[2, 0], np.inf), ["a", "b"])
    with pytest.raises(ValueError, match="feature 'c' holds"):
        daily_features(frame.assign(c="high"), ["a", "c"])
    with pytest.raises(ValueError, match="features 'b' have missing values"):
        PanelWindows(gone, window=2)


@given(seed=st.integers(0, 9), window=st.integers(1, 5), missing=st.sampled_from([0.0, 0.2, 0.5]))
def test_windows_are_the_last_days_in_a_row_and_never_cross_a_missing_span(seed, window, missing):
    frame = random_panel(seed=seed, missing=missing)
    windows = PanelWindows(frame, window, label=frame["a"])
    calendar = frame.index.get_level_values(0).unique().sort_values()
    expected = {}
    for at, day in enumerate(calendar):
        history = calendar[max(at - window + 1, 0) : at + 1]
        for name in sorted(frame.index.get_level_values(1).unique()):
            if len(history) == window and all((d, name) in frame.index for d in history):
                expected[day, name] = frame.loc[[(d, name) for d in history]].to_numpy()
    found = {}
    for i in range(len(windows)):
        x, y = windows[i]
        assert (windows.rows(i).get_level_values(0) == windows.days[i]).all()
        for row, values, label in zip(windows.rows(i), x.numpy(), y.numpy(), strict=True):
            found[row] = values
            assert label == np.float32(frame.loc[row, "a"])
    assert list(found) == list(expected)
    for row, values in expected.items():
        np.testing.assert_allclose(found[row], values, rtol=1e-6)


def test_days_and_names_that_are_left_out_still_serve_as_history():
    frame = random_panel(days=6, names=3)
    days = frame.index.get_level_values(0).unique()
    member = pd.Series(True, frame.index)
    member.loc[(slice(None), "n1")] = False
    windows = PanelWindows(frame, 3, keep=member, days=days[3:5])
    assert list(windows.days) == list(days[3:5])
    assert windows.rows(0).get_level_values(1).tolist() == ["n0", "n2"]
    np.testing.assert_allclose(windows[0][0][0], frame.xs("n0", level=1).iloc[1:4], rtol=1e-6)
    assert windows[0][1].isnan().all()  # no labels were given
    assert len(PanelWindows(frame, 7)) == 0
    with pytest.raises(ValueError, match="window=0"):
        PanelWindows(frame, 0)


@given(
    days=st.integers(12, 60),
    train=st.integers(1, 6),
    valid=st.integers(1, 3),
    test=st.integers(1, 3),
    gap=st.integers(1, 1),
)
def test_labels_to_learn_from_end_before_the_days_to_choose_by(days, train, valid, test, gap):
    splits = purged_splits(range(days), train=train, valid=valid, test=test, gap=gap, horizon=1)
    tested = [day for split in splits for day in split.test]
    assert len(tested) == len(set(tested))
    for split in splits:
        assert (len(split.train), len(split.valid), len(split.test)) == (train, valid, test)
        # a label of day t is the return between the closes of t + 1 and t + 2
        assert split.train[-1] + 1 + 1 <= split.valid[0]
        assert split.valid[-1] + 1 + 1 <= split.test[0]
    assert days - splits[-1].test[-1] <= test


def test_splits_that_leak_or_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="leakage: labels look 5 days ahead but the gap is 2; use gap ≥ 5"):
        purged_splits(range(100), train=10, valid=5, test=5, gap=2, horizon=5)
    with pytest.raises(ValueError, match=r"20 days do not hold 10 \+ 5 \+ 5 and two gaps of 1 \(22"):
        purged_splits(range(20), train=10, valid=5, test=5, gap=1)
    with pytest.raises(ValueError, match="valid=0"):
        purged_splits(range(20), train=10, valid=0, test=5, gap=1)
