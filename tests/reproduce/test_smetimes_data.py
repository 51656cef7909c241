import numpy as np
import pandas as pd
import pytest

from coterie.reproduce.smetimes import bouncing_levels, read_data


def test_generated_series_stay_between_their_turning_points_and_follow_from_the_seed():
    values = bouncing_levels(50, seed=3)
    assert values.shape == (50, 192)
    assert values.abs().max() < 3 + 1.2 + 0.25 + 0.6
    assert (values == bouncing_levels(50, seed=3)).all()
    assert not (values == bouncing_levels(50, seed=4)).any()


def test_half_of_them_turn_their_season_over_every_day():
    values = bouncing_levels(400, seed=0)
    shapes = values.view(400, 8, 24) - values.view(400, 8, 24).mean(2, keepdim=True)
    alike = (shapes[:, 0] * shapes[:, 1]).mean(1) < 0
    assert 0.35 < alike.float().mean() < 0.65


def test_a_table_as_ett_has_it_is_read_and_another_is_refused(tmp_path):
    table = pd.DataFrame({"date": pd.date_range("2020", periods=9, freq="h"), "OT": np.arange(9.0)})
    table.to_csv(tmp_path / "good.csv", index=False)
    assert read_data(tmp_path / "good.csv").shape == (9, 2)
    table.rename(columns={"date": "time"}).to_csv(tmp_path / "named.csv", index=False)
    with pytest.raises(ValueError, match="the first column is 'time'; should be \"date\""):
        read_data(tmp_path / "named.csv")
    table.iloc[::-1].to_csv(tmp_path / "reversed.csv", index=False)
    with pytest.raises(ValueError, match="lies before the time of the row above"):
        read_data(tmp_path / "reversed.csv")
