import numpy as np
import pandas as pd
import pytest
from forecasts import table

from coterie.forecast.series import later_times, read_series


@pytest.mark.parametrize(
    ("step", "found"), [("h", "h"), ("15min", "15min"), ("MS", "MS"), ("B", "B"), ("D", "D")]
)
def test_the_step_is_inferred_and_times_go_on_by_it(step, found):
    frame = table(40, step=step)
    series = read_series(frame, "date")
    assert series.step == found
    expected = pd.date_range(frame["date"].iloc[-1], periods=4, freq=step)[1:]
    assert (pd.DatetimeIndex(later_times(series.times_T[-1], series.step, 3)) == expected).all()


def test_a_table_may_have_no_times_and_columns_may_be_chosen():
    series = read_series(table(9)[["load", "heat"]], None, ["heat"])
    assert (series.times_T, series.step, series.names, series.values_TC.shape) == (None, "", ["heat"], (9, 1))


def test_times_as_text_are_read_as_times():
    frame = table(9)
    as_text = frame.assign(date=frame["date"].astype(str))
    np.testing.assert_array_equal(read_series(as_text, "date").times_T, read_series(frame, "date").times_T)


def test_missing_times_are_filled_by_straight_lines_with_a_warning():
    frame = pd.DataFrame({"date": pd.date_range("2020", periods=9, freq="h"), "load": np.arange(9.0) ** 2})
    gone = frame.drop(index=[3, 4])
    with pytest.warns(UserWarning, match="2 of 9 times are missing, the first is 2020-01-01 03:00:00"):
        series = read_series(gone, "date")
    np.testing.assert_allclose(series.values_TC[:, 0], [0, 1, 4, 11, 18, 25, 36, 49, 64])
    assert series.step == "h"


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (7, None, "column 'load', row 7: missing"),
        (0, "x", "column 'load', row 0: 'x' where a finite number should be"),
        (3, float("inf"), "column 'load', row 3: inf where a finite number should be"),
    ],
)
def test_what_is_no_number_is_refused_by_column_and_row(row, value, message):
    frame = table(12).astype({"load": object})
    frame.loc[row, "load"] = value
    with pytest.raises(ValueError, match=message):
        read_series(frame, "date")


def test_bad_times_are_refused_by_row():
    frame = table(12)
    with pytest.raises(ValueError, match=r"'date', row 5: 2020-01-01 04:00:00 repeats the time"):
        read_series(pd.concat([frame[:5], frame[4:]], ignore_index=True), "date")
    with pytest.raises(ValueError, match=r"'date', row 2: 2020-01-01 02:00:00 lies before"):
        read_series(frame.iloc[[0, 3, 2, 1, 4]], "date")
    off = frame.assign(date=frame["date"].where(frame.index != 6, pd.Timestamp("2020-01-01 06:20:00")))
    with pytest.raises(ValueError, match=r"'date', row 6: 2020-01-01 06:20:00 is off the grid"):
        read_series(off, "date")
    text = frame.assign(date=frame["date"].astype(str).where(frame.index != 3, "noon"))
    with pytest.raises(ValueError, match="'date', row 3: 'noon' is no time"):
        read_series(text, "date")


def test_missing_columns_and_forgotten_time_columns_are_named():
    with pytest.raises(ValueError, match="no column 'time'; it has date, load, heat"):
        read_series(table(9), "time")
    with pytest.raises(ValueError, match="column 'date' holds times"):
        read_series(table(9), None)
    with pytest.raises(ValueError, match=r"give a list of names, \['load'\]"):
        read_series(table(9), "date", "load")
    with pytest.raises(ValueError, match="no columns to forecast"):
        read_series(table(9)[["date"]], "date")
    with pytest.raises(ValueError, match="has 2 rows"):
        read_series(table(2), "date")
