import json

import numpy as np
import pandas as pd
import pytest

from coterie.estimate import Columns, find_estimators, fit, predict

SETTINGS = ["horizon=12", "seq_len=48", "token_len=12", "epochs=1", "prompt=none", "random_state=0"]


def hourly(rows):
    hours = np.arange(rows)
    return pd.DataFrame(
        {"date": pd.date_range("2020", periods=rows, freq="h"), "load": np.sin(hours / 4), "OT": hours % 24.0}
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smetimes")
    hourly(300).to_csv(folder / "past.csv", index=False)
    columns = Columns(time="date", target=("OT",))
    return folder, fit("smetimes", folder / "past.csv", folder / "model", columns, SETTINGS)


def test_fit_measures_on_the_last_fifth_beside_repeating_the_last_day(made):
    folder, described = made
    assert "smetimes" in find_estimators()
    report = described["report"]
    assert (report["rows fitted"], report["rows tested"], report["horizon"]) == (240, 60, 12)
    assert report["MSE of repeating the last day"] == pytest.approx(0, abs=1e-10)  # OT is the hour
    assert report["MSE, scaled"] > 0
    assert sum(described["usage"]["gate"]) == pytest.approx(1)
    assert json.loads((folder / "model" / "fit.json").read_text())["report"] == report
    assert (folder / "model" / "experts.png").stat().st_size > 1000


def test_predict_forecasts_what_follows_the_tables_end(made, tmp_path):
    folder, _ = made
    hourly(100).to_csv(tmp_path / "recent.csv", index=False)
    assert predict(folder / "model", tmp_path / "recent.csv", tmp_path / "next.csv") == 12
    forecast = pd.read_csv(tmp_path / "next.csv", parse_dates=["date"])
    assert list(forecast.columns) == ["date", "OT"]
    assert forecast["date"].iloc[0] == pd.Timestamp("2020-01-05 04:00")


def test_a_forgotten_time_column_is_refused_and_nothing_is_written(made, tmp_path):
    folder, _ = made
    with pytest.raises(ValueError, match="column 'date', row 0: '2020-01-01 00:00:00' where a finite number"):
        fit("smetimes", folder / "past.csv", tmp_path / "model", Columns(), SETTINGS)
    assert not (tmp_path / "model").exists()
