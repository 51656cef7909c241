import json
import random

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from coterie.data import PanelWindows, daily_features, panel_frame, read_table
from coterie.estimate import Columns
from coterie.estimate import fit as fit_table
from coterie.estimate import predict as predict_table
from coterie.finance.backbones import BACKBONES
from coterie.finance.backtest import ic_report
from coterie.finance.bars import bar_features
from coterie.finance.losses import concordance, information_coefficient, standardised
from coterie.finance.miga import MIGARegressor
from coterie.finance.network import MIGA, OneResponse
from coterie.finance.style_panel import style_panel
from coterie.finance.train import Scores, train_by_day
from coterie.finance.windows import WindowReader
from coterie.nn import balance
from coterie.reproduce import miga

STOCKS, DAYS = 24, 60
STOCKS_FILE = "stocks/us80-daily-2011-2017.csv.gz"


@pytest.fixture(scope="module")
def panel():
    return style_panel(stocks=STOCKS, days=DAYS, styles=4, seed=3)[0]


@pytest.fixture(scope="module")
def fitted(panel):
    return MIGARegressor(epochs=4).fit(panel.loc[:39], panel.loc[:51])


def bars(days=60, names=12, seed=0):
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product(
        [pd.bdate_range("2020-01-01", periods=days), [f"n{i:02d}" for i in range(names)]],
        names=["date", "ticker"],
    )
    close = 50 * np.exp(0.02 * rng.normal(size=(days, names)).cumsum(0)).reshape(-1)
    low, high = close * 0.99, close * 1.01
    volume = rng.integers(1e4, 1e5, len(close))
    return pd.DataFrame({"open": close, "high": high, "low": low, "close": close, "volume": volume}, index)


def shuffled_after(frame, day, seed=0):
    """The same past; every later row holds the numbers of another later row."""
    later = frame.index.get_level_values(0) > day
    mixed = frame.copy()
    order = np.random.default_rng(seed).permutation(int(later.sum()))
    mixed.loc[later] = frame[later].to_numpy()[order]
    return mixed


def test_scores_are_of_every_window_and_know_their_day_and_name(fitted, panel):
    scores = fitted.predict(panel)
    expected = panel.loc[4:].index
    assert scores.index.equals(expected)
    assert scores.index.names == ["date", "instrument"]
    assert fitted.predict(panel.drop(columns="label")).equals(scores)
    assert len(fitted.predict(panel.loc[:3])) == 0
    weights = fitted.route(panel)
    assert weights.index.equals(expected)
    assert weights.columns.tolist() == [f"expert {e}" for e in range(8)]
    assert ((weights > 0).sum(axis=1) == 2).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert sum(fitted.expert_usage_) == pytest.approx(1)


def test_no_look_ahead_when_the_future_is_shuffled_scores_of_the_past_stay(fitted, panel):
    mixed = shuffled_after(panel, 30)
    assert not fitted.predict(mixed).loc[31:].equals(fitted.predict(panel).loc[31:])
    pd.testing.assert_series_equal(fitted.predict(mixed).loc[:30], fitted.predict(panel).loc[:30])
    pd.testing.assert_frame_equal(fitted.route(mixed).loc[:30], fitted.route(panel).loc[:30])
    cut = fitted.predict(panel.loc[:30])
    pd.testing.assert_series_equal(cut, fitted.predict(panel).loc[:30])


def test_no_look_ahead_from_bars_to_features_labels_and_scores():
    table = bars()
    days = table.index.get_level_values(0).unique()
    day, mixed = days[44], shuffled_after(table, days[44])
    pd.testing.assert_frame_equal(bar_features(mixed).loc[:day], bar_features(table).loc[:day])
    options = {"target": "close", "target_is": "bars", "epochs": 2}
    model = MIGARegressor(**options).fit(table.loc[: days[40]], table.loc[: days[50]])
    pd.testing.assert_series_equal(model.predict(mixed).loc[:day], model.predict(table).loc[:day])
    # what is learned up to a day does not depend on what comes after it, labels included
    read = WindowReader("close", target_is="bars")
    label, other = read.label(table), read.label(mixed)
    pd.testing.assert_series_equal(label.loc[: days[42]], other.loc[: days[42]])
    assert not label.loc[days[43] :].equals(other.loc[days[43] :])


def test_labels_of_training_never_reach_into_the_days_of_validation():
    table = bars()
    days = table.index.get_level_values(0).unique()
    for horizon in (1, 4):
        read = WindowReader("close", target_is="close", horizon=horizon)
        train, valid = read.for_training(table.loc[: days[30]], table.loc[: days[50]])
        taught = max(d for i, d in enumerate(train.days) if bool(train[i][1].isfinite().any()))
        assert taught == days[30 - 1 - horizon]  # the last whose label the frame itself ends with
        assert valid.days[0] == days[30]
        labelled = WindowReader("label", horizon=horizon)
        panel = style_panel(stocks=6, days=40)[0]
        _, valid = labelled.for_training(panel.loc[:19], panel)
        assert valid.days[0] == 20 + horizon


def test_the_order_of_stocks_within_a_day_changes_nothing(fitted, panel):
    order = np.random.default_rng(0).permutation(STOCKS)
    names = panel.index.get_level_values(1).unique()
    renamed = panel.rename(index=dict(zip(names, names[order], strict=True)), level=1)
    before, after = fitted.predict(panel), fitted.predict(renamed)
    back = after.rename(index=dict(zip(names[order], names, strict=True)), level=1).reindex(before.index)
    pd.testing.assert_series_equal(back, before, rtol=1e-5)


def test_the_same_seed_gives_the_same_scores_and_leaves_every_generator_alone(panel):
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    fit = [MIGARegressor(epochs=1, random_state=s).fit(panel.loc[:20], panel.loc[:40]) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    first, second, third = (model.predict(panel) for model in fit)
    assert first.equals(second)
    assert not first.equals(third)


@pytest.mark.parametrize("options", [{}, {"backbone": "gru"}, {"backbone": "attention", "loss": "ccc"}])
def test_a_saved_estimator_predicts_the_same(options, panel, tmp_path):
    model = MIGARegressor(epochs=1, auxiliary=0.5, **options).fit(panel.loc[:20], panel.loc[:40])
    model.save(tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"estimator.json", "weights.safetensors"}
    loaded = MIGARegressor.load(tmp_path / "model")
    assert loaded.predict(panel).equals(model.predict(panel))
    assert loaded.history_ == model.history_
    assert loaded.expert_usage_ == model.expert_usage_


def test_any_module_can_be_the_encoder_and_is_copied(panel, tmp_path):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(30, 7), nn.Tanh())
    before = encoder[1].weight.clone()
    model = MIGARegressor(encoder=encoder, epochs=1).fit(panel.loc[:20], panel.loc[:40])
    assert torch.equal(encoder[1].weight, before)
    assert not torch.equal(model.model_.encoder[1].weight, before)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="was fitted with encoder=Sequential"):
        MIGARegressor.load(tmp_path / "model")
    loaded = MIGARegressor.load(tmp_path / "model", encoder=encoder)
    assert loaded.predict(panel).equals(model.predict(panel))
    with pytest.raises(ValueError, match=r"the encoder gives \(2, 5, 6\) for 2 windows"):
        MIGARegressor(encoder=nn.Identity(), epochs=1).fit(panel.loc[:20], panel.loc[:40])


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_take_any_number_of_stocks_and_every_day_of_the_window_counts(name):
    encoder = BACKBONES[name](6, 24, 5)
    x = torch.randn(9, 5, 6, requires_grad=True)
    z = encoder(x)
    assert z.shape == (9, 24)
    torch.testing.assert_close(encoder(x[:4]), z[:4])
    z.square().sum().backward()
    assert bool((x.grad.abs().sum((0, 2)) > 0).all())


def test_losses_are_the_published_formulas():
    score, label = torch.randn(2, 40, dtype=torch.float64)
    pair = np.stack([score.numpy(), label.numpy()])
    assert float(information_coefficient(score, label)) == pytest.approx(np.corrcoef(pair)[0, 1])
    assert float(information_coefficient(3 * score + 7, label)) == pytest.approx(np.corrcoef(pair)[0, 1])
    (vs, cov), (_, vl) = np.cov(pair, ddof=0)
    expected = 2 * cov / (vs + vl + (pair[0].mean() - pair[1].mean()) ** 2)
    assert float(concordance(score, label)) == pytest.approx(expected)
    assert float(concordance(label, label)) == pytest.approx(1)
    flat = torch.full((8,), 0.1, requires_grad=True)
    information_coefficient(flat, torch.randn(8)).backward()
    assert bool(flat.grad.isfinite().all())
    assert standardised(torch.randn(4)) is None
    assert standardised(torch.full((9,), 0.1)) is None


def test_days_that_teach_nothing_are_skipped(panel):
    gaps = panel.copy()
    gaps.loc[10, "label"] = np.nan
    gaps.loc[11, "label"] = 2.5
    gaps.loc[(12, "s004") : (12, "s999"), "label"] = np.nan  # four names are left
    model = MIGARegressor(epochs=1).fit(gaps.loc[:20], gaps.loc[:40])
    assert model.history_.days_skipped == 3
    assert np.isfinite(model.history_.loss).all()


def test_an_instrument_without_a_label_does_not_change_what_is_learned(panel):
    known = panel.loc[:20]
    without = known.drop("s000", level=1)
    hidden = known.assign(label=known["label"].mask(known.index.get_level_values(1) == "s000"))

    def trained(frame):
        # scored over the same names, so that only the label differs
        features = daily_features(known, [f"x{i}" for i in range(1, 7)])
        train = PanelWindows(features.loc[frame.index], 5, label=frame["label"])
        torch.manual_seed(0)
        network = MIGA(BACKBONES["conv"](6, 8, 5), 8)
        train_by_day(network, train, train, epochs=1)
        return network.state_dict()

    for a, b in zip(trained(without).values(), trained(hidden).values(), strict=True):
        torch.testing.assert_close(a, b)


class Scheduled(nn.Module):
    """Scores the label itself, times a weight that training moves: its rank IC is 1 or -1 by its sign."""

    def __init__(self, start):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start))

    def forward(self, x_NLF):
        return Scores(self.weight * x_NLF[:, -1, 0])


def test_the_epoch_with_the_best_validation_rank_ic_is_kept_and_patience_stops(panel):
    right = PanelWindows(panel[["label"]], 5, label=panel["label"])
    wrong = PanelWindows(panel[["label"]], 5, label=-panel["label"])
    model = Scheduled(0.12)  # right for validation, and training turns it around
    history = train_by_day(model, wrong, right, loss="mse", epochs=6, patience=2, lr=1e-3)
    assert history.valid_rank_ic[0] == pytest.approx(1)
    assert history.valid_rank_ic[-1] == pytest.approx(-1)
    assert history.best == 0
    assert len(history.loss) == 3
    assert model.weight.item() > 0


def test_balance_and_auxiliary_losses_do_what_they_say(panel):
    def usage(**options):
        model = MIGARegressor(epochs=2, random_state=1, **options).fit(panel.loc[:39], panel.loc[:51])
        windows = model.reader().for_training(panel.loc[:39], panel.loc[:51])[1]
        terms = [balance.load_balance(model.model_(windows[i][0]).routing) for i in range(len(windows))]
        return torch.stack(terms).mean().item(), model

    even, _ = usage(balance=1.0)
    free, model = usage(balance=0.0)
    assert even < free
    assert model.model_.auxiliary is None
    with_head = usage(auxiliary=1.0)[1]
    windows = with_head.reader().for_training(panel.loc[:39], panel.loc[:51])[0]
    x, y = zip(*(windows[i] for i in range(1, len(windows))), strict=True)
    ics = [information_coefficient(with_head.model_(a).auxiliary, b) for a, b in zip(x, y, strict=True)]
    assert torch.stack(ics).mean().item() > 0.1  # the head has learned as well


def test_styles_are_told_apart_after_a_short_training():
    panel, style = style_panel(stocks=40, days=90, styles=4, signal=2.0, seed=1)
    model = MIGARegressor(epochs=5, lr=1e-2).fit(panel.loc[:59], panel.loc[:74])
    test = ic_report(model.predict(panel).loc[76:], panel["label"])
    assert test["rank IC"] > 0.4
    strongest = model.route(panel).loc[76:].to_numpy().argmax(1)
    of = style[model.route(panel).loc[76:].index.get_level_values(1)].to_numpy()
    purest = sum(np.bincount(of[strongest == e], minlength=4).max() for e in set(strongest))
    assert purest / len(of) > 0.5  # a style by chance: 0.25


def test_names_that_may_not_be_held_are_history_only(panel):
    flagged = panel.assign(member=(panel.index.get_level_values(1) != "s003").astype(int))
    model = MIGARegressor(tradable="member", epochs=1).fit(flagged.loc[:20], flagged.loc[:40])
    assert "member" not in model.features_
    assert "s003" not in model.predict(flagged).index.get_level_values(1)


def test_a_single_response_trains_in_the_same_loop(panel):
    train, valid = WindowReader().for_training(panel.loc[:30], panel.loc[:45])
    model = OneResponse(nn.Flatten(), nn.Linear(30, 1))
    history = train_by_day(model, train, valid, epochs=3)
    assert history.loss[-1] < history.loss[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k=9 of 2 × 4 experts; use 1 ≤ top_k ≤ 8"),
        ({"n_groups": 0}, "n_groups=0; should be at least 1"),
        ({"backbone": "cnn"}, "backbone='cnn'; use one of conv, gru, attention"),
        ({"loss": "sharpe"}, "loss='sharpe'; use one of ic, ccc, mse"),
        ({"balance": -1.0}, "balance=-1.0"),
        ({"patience": 0, "epochs": 1}, "patience=0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message, panel):
    with pytest.raises(ValueError, match=message):
        MIGARegressor(**options).fit(panel.loc[:20], panel.loc[:40])


def test_panels_that_teach_nothing_are_refused(panel):
    new = lambda **options: MIGARegressor(epochs=1, **options)  # noqa: E731
    with pytest.raises(ValueError, match="leakage: the last training day is 40"):
        new().fit(panel.loc[:40], panel.loc[:41])
    with pytest.raises(ValueError, match="no day of the panel has a window of 30 days"):
        new(window=30).fit(panel.loc[:20], panel)
    with pytest.raises(ValueError, match="no column 'ret5'; it has x1"):
        new(target="ret5").fit(panel.loc[:20], panel)
    with pytest.raises(ValueError, match="no numeric column beside 'label'"):
        new().fit(panel[["label"]].loc[:20], panel)
    with pytest.raises(ValueError, match="target 'label' holds"):
        new().fit(panel.assign(label="up").loc[:20], panel)
    with pytest.raises(ValueError, match="no day to validate on"):
        new().fit(panel.loc[:20], panel.assign(label=np.nan))
    with pytest.raises(ValueError, match="each needs 5 instruments"):
        new().fit(panel.loc[(slice(20), ["s000", "s001"]), :], panel)
    dated = panel.rename(index=lambda day: pd.Timestamp("2024-01-01") + pd.Timedelta(days=day), level=0)
    with pytest.raises(ValueError, match="panel has times in whole numbers, valid in dates"):
        new().fit(panel.loc[:20], dated)
    with pytest.raises(ValueError, match="learnt nothing yet"):
        new().predict(panel)


def test_from_a_table_of_bars_to_predictions(tmp_path):
    table = bars(days=90)
    file = tmp_path / "bars.csv"
    table.reset_index().to_csv(file, index=False)
    columns = Columns(("close",), "date", "ticker")
    settings = ["target_is=bars", "epochs=2", "backbone=gru"]
    described = fit_table("miga", file, tmp_path / "fitted", columns, settings)
    report = described["report"]
    assert abs(report["rank IC"]) < 0.5
    assert report["names held"] == 1
    assert sum(described["usage"]["gate"]) == pytest.approx(1)
    rows = predict_table(tmp_path / "fitted", file, tmp_path / "scores.csv")
    scores = pd.read_csv(tmp_path / "scores.csv", parse_dates=["date"])
    assert rows == len(scores) == 12 * (90 - 20 - 4)
    assert scores.columns.tolist() == ["date", "ticker", "score"]
    loaded = MIGARegressor.load(tmp_path / "fitted" / "estimator")
    np.testing.assert_allclose(scores["score"], loaded.predict(table), rtol=1e-5)
    assert json.loads((tmp_path / "fitted" / "fit.json").read_text())["settings"]["backbone"] == "gru"
    with pytest.raises(ValueError, match="name the target with --target"):
        fit_table("miga", file, tmp_path / "other", columns, ["target=open"])


def test_real_bars_are_read_and_ranked(data_dir):
    panel = panel_frame(read_table(data_dir / STOCKS_FILE), time="date", group="ticker")
    days = panel.index.get_level_values(0).unique()[:120]
    panel = panel.loc[: days[-1]]
    model = MIGARegressor("close", target_is="bars", epochs=1, window=10)
    model.fit(panel.loc[: days[70]], panel.loc[: days[90]])
    score = model.predict(panel)
    assert score.groupby(level=0).size().min() >= 70
    assert score.notna().all()
    report = ic_report(score.loc[days[92] :], model.reader().label(panel))
    assert abs(report["rank IC"]) < 0.3  # more would be a leak


def test_the_experiment_reads_qlibs_frames_and_flat_tables(tmp_path, panel):
    dated = panel.rename(index=lambda day: pd.Timestamp("2024-01-01") + pd.Timedelta(days=day), level=0)
    dated.index.names = ["datetime", "instrument"]
    columns = [*(("feature", f"x{i}") for i in range(1, 7)), ("label", "LABEL0")]
    qlib = dated.set_axis(pd.MultiIndex.from_tuples(columns), axis=1)
    qlib.to_parquet(tmp_path / "qlib.parquet")
    dated.reset_index().to_csv(tmp_path / "flat.csv", index=False)
    for file in ("qlib.parquet", "flat.csv"):
        read = miga.read_data(tmp_path / file)
        np.testing.assert_allclose(read.to_numpy(), panel.to_numpy())
        values = miga.ARMS["style/miga"](0, "smoke", read)
        assert np.isfinite(values["rank IC"])
    dated.drop(columns="label").to_parquet(tmp_path / "unlabelled.parquet")
    with pytest.raises(ValueError, match="has no column 'label'; it has x1"):
        miga.read_data(tmp_path / "unlabelled.parquet")
