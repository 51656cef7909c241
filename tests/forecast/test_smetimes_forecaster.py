import numpy as np
import pandas as pd
import pytest
import torch
from forecasts import SMALL, save_language_model, table

from coterie.forecast.backtest import forecast_windows
from coterie.forecast.smetimes import SMETimesForecaster


@pytest.fixture(scope="module")
def fitted():
    return SMETimesForecaster(24, **{**SMALL, "epochs": 12, "lr": 5e-3}).fit(table(), time_col="date")


def test_it_forecasts_the_rows_that_follow_in_their_own_units(fitted):
    whole = table(424)
    forecast = fitted.predict(whole[:400])
    assert list(forecast.columns) == ["date", "load", "heat"]
    assert (forecast["date"].to_numpy() == whole["date"][400:].to_numpy()).all()
    for name in ("load", "heat"):
        error = (forecast[name].to_numpy() - whole[name][400:].to_numpy()).std() / whole[name].std()
        assert error < 0.4


def test_only_the_last_rows_matter(fitted):
    pd.testing.assert_frame_equal(fitted.predict(table()), fitted.predict(table()[-48:]))


def test_the_score_is_minus_the_mean_squared_error_of_all_places(fitted):
    seen = table()[-80:]
    errors = fitted.backtest(seen)
    assert errors["forecasts"] == 2 * (80 - 48 - 24 + 1)
    assert fitted.score(seen) == -errors["mse"]
    squared, naive = [], []
    for start in range(9):
        known, true = seen[start : start + 48], seen[start + 48 : start + 72]
        forecast = fitted.predict(known)
        for c, name in enumerate(["load", "heat"]):
            scale = fitted.deviation_[c]
            squared.append(((forecast[name].to_numpy() - true[name].to_numpy()) / scale) ** 2)
            naive.append(((known[name].to_numpy()[-24:] - true[name].to_numpy()) / scale) ** 2)
    assert errors["mse"] == pytest.approx(np.mean(squared), rel=1e-4)
    assert errors["naive mse"] == pytest.approx(np.mean(naive), rel=1e-4)


def test_forecasts_do_not_depend_on_the_future_but_an_oracles_do(fitted):
    seen, changed = table()[-72:].reset_index(drop=True), table()[-72:].reset_index(drop=True)
    changed.loc[48:, ["load", "heat"]] += 5 * fitted.deviation_  # what is forecast: a shift of 5 deviations
    for oracle, same in ((False, True), (True, False)):
        mean = [fitted.backtest(f, oracle_prompt=oracle) for f in (seen, changed)]
        # the same forecast is 5 farther from a truth that lies 5 higher: (e + 5)² = e² + 10 e + 25
        shift = [forecast_bias(fitted, f, oracle) for f in (seen, changed)]
        assert (abs(shift[1] - shift[0] - 5) < 1e-4) is same
        assert mean[0]["mse"] < mean[1]["mse"]


def forecast_bias(model, frame, oracle):
    """Mean of true value minus forecast, scaled, at the one place of the frame."""
    series = model._read(frame, 72)
    windows, rows = model._windows(series, torch.tensor([0])), torch.arange(2)
    truth = windows.steps(rows, 48, 24)
    return (
        (truth - forecast_windows(model.model_, windows, rows, 24, oracle_BH=truth if oracle else None))
        .mean()
        .item()
    )


def test_expert_usage_sums_to_one_for_every_column(fitted):
    assert fitted.expert_usage_.shape == (4,)
    np.testing.assert_allclose(fitted.expert_usage_by_column_.sum(1), [1, 1], rtol=1e-5)
    np.testing.assert_allclose(fitted.expert_usage_, fitted.expert_usage_by_column_.mean(0))
    assert 0 < fitted.prompt_share_ < 1


def test_the_same_random_state_gives_the_same_forecasts_and_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    models = [SMETimesForecaster(24, **SMALL).fit(table(), time_col="date") for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    pd.testing.assert_frame_equal(models[0].predict(table()), models[1].predict(table()))
    other = SMETimesForecaster(24, **{**SMALL, "random_state": 1}).fit(table(), time_col="date")
    assert not np.allclose(other.predict(table())["load"], models[0].predict(table())["load"])


def test_a_saved_estimator_forecasts_the_same(fitted, tmp_path):
    before = torch.get_rng_state()
    loaded = SMETimesForecaster.load(fitted.save(tmp_path / "model"))
    assert torch.equal(before, torch.get_rng_state())
    pd.testing.assert_frame_equal(loaded.predict(table()), fitted.predict(table()))
    np.testing.assert_array_equal(loaded.expert_usage_, fitted.expert_usage_)
    assert loaded.history_ == fitted.history_
    assert loaded.get_params() == fitted.get_params()


def test_a_language_model_in_a_folder_serves_as_backbone_and_must_be_the_same_on_loading(tmp_path):
    folder = save_language_model(tmp_path / "language")
    model = SMETimesForecaster(
        12, **SMALL, backbone=folder, prompt_pool="last", cache=str(tmp_path / "cache")
    )
    model.fit(table(120), time_col="date")
    saved = model.save(tmp_path / "model")
    assert (saved / "weights.safetensors").stat().st_size < 60_000  # the language model stays where it is
    again = SMETimesForecaster.load(saved)
    pd.testing.assert_frame_equal(again.predict(table(120)), model.predict(table(120)))
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    SMETimesForecaster(**model.get_params()).fit(table(120), time_col="date")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == kept

    (tmp_path / "language").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="no folder with a config"):
        SMETimesForecaster.load(saved)
    moved = SMETimesForecaster.load(saved, backbone=str(tmp_path / "moved"))
    pd.testing.assert_frame_equal(moved.predict(table(120)), model.predict(table(120)))
    other = save_language_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"was fitted on the backbone .*language' with digest"):
        SMETimesForecaster.load(saved, backbone=other)
    with pytest.raises(ValueError, match="but that of 'tiny' is"):
        SMETimesForecaster.load(saved, backbone="tiny")


def test_it_works_without_times_without_prompts_and_with_a_constant_column():
    frame = table(200)[["load"]].assign(flat=5.0)
    model = SMETimesForecaster(20, **SMALL).fit(frame)
    forecast = model.predict(frame)
    assert list(forecast.columns) == ["load", "flat"]
    np.testing.assert_allclose(forecast["flat"], 5, atol=0.05)
    plain = SMETimesForecaster(20, **SMALL, prompt="none").fit(frame)
    assert plain.prompt_share_ == 0
    assert np.isfinite(plain.predict(frame)["load"]).all()


def test_one_expert_is_fitted_with_a_warning():
    with pytest.warns(UserWarning, match="num_experts=1: the gate's one weight is always 1"):
        SMETimesForecaster(12, **SMALL, num_experts=1).fit(table(120), time_col="date")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_len": 13}, "seq_len=48 is not a multiple of token_len=13"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"horizon": 0}, "horizon=0; should be at least 1"),
        ({"validation": 1.5}, "validation=1.5"),
        ({"lr": 0.0}, "lr=0"),
        ({"prompt": "poem"}, "prompt='poem'; use one of stats, time, none"),
        ({"horizon": 200}, "320 to train on and 80 for validation"),
        ({"lr": 1e30}, "use a smaller lr than 1e"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SMETimesForecaster(**{"horizon": 24, **SMALL, **options}).fit(table(), time_col="date")


def test_bad_tables_are_refused(fitted, tmp_path):
    with pytest.raises(ValueError, match="is not fitted"):
        SMETimesForecaster().predict(table())
    with pytest.raises(ValueError, match="47 rows; should have at least 48"):
        fitted.predict(table(47))
    with pytest.raises(ValueError, match="rows are '15min' apart, those it was fitted on 'h'"):
        fitted.predict(table(step="15min"))
    with pytest.raises(ValueError, match="no column 'heat'"):
        fitted.predict(table()[["date", "load"]])
    gap = table()
    gap.loc[390, "heat"] = np.nan
    with pytest.raises(ValueError, match="column 'heat', row 390: missing"):
        fitted.predict(gap)
    with pytest.raises(ValueError, match='prompt="time" but the series has no times'):
        SMETimesForecaster(24, **SMALL, prompt="time").fit(table()[["load"]])


def test_it_beats_repeating_the_last_day_on_etth1(data_dir):
    frame = pd.read_csv(data_dir / "forecast" / "ETTh1.csv")[:3000]
    options = {"seq_len": 192, "token_len": 24, "stride": 3, "epochs": 8, "batch_size": 64, "lr": 2e-3}
    model = SMETimesForecaster(48, **options, random_state=0).fit(
        frame[:2400], time_col="date", columns=["OT", "HUFL"]
    )
    errors = model.backtest(frame[2400 - 192 :], stride=7)
    assert errors["mse"] < errors["naive mse"]
