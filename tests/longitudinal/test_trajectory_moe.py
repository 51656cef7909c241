"""The estimator on simulated persons of known classes, and on bad tables."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from coterie.longitudinal import (
    DegenerateClassError,
    TrajectoryMoE,
    align_classes,
    compare_fits,
    latent_kappa,
    select_n_classes,
    simulate_trajectories,
)
from coterie.longitudinal.compare import entropy_index
from coterie.longitudinal.estimation import information, natural_covariance
from coterie.longitudinal.growth_mixture import GrowthMixture
from coterie.reproduce.moe_trajectories import true_parameters

FULL = {"gate": "gx1 + gx2", "experts": "ex1 + ex2"}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return simulate_trajectories(300, seed=1)


@pytest.fixture(scope="module")
def model(frame) -> TrajectoryMoE:
    return TrajectoryMoE(2, **FULL, n_init=2).fit(frame)


def to_long(frame: pd.DataFrame) -> pd.DataFrame:
    long = pd.wide_to_long(frame, ["Y", "T"], i="id", j="wave").reset_index()
    return long.rename(columns={"Y": "score", "T": "time"}).sort_values(["id", "time"])


def curves(num_persons: int, make, *, bends, seed: int = 0, occasions: int = 8) -> pd.DataFrame:
    """Two classes that differ in their bend; make(t [T, J], bend [T, 1], noise of two factors) → y [T, J]."""
    rng = np.random.default_rng(seed)
    bend = np.array(bends)[rng.integers(0, 2, num_persons)][:, None]
    t = np.tile(np.arange(occasions, dtype=float), (num_persons, 1)) + rng.uniform(
        0, 0.2, (num_persons, occasions)
    )
    noise = rng.standard_normal((2, num_persons, 1))
    y = make(t, bend, noise) + rng.normal(0, 0.3, t.shape)
    columns = {f"Y{j}": y[:, j] for j in range(occasions)} | {f"T{j}": t[:, j] for j in range(occasions)}
    return pd.DataFrame(
        columns | {"z": rng.standard_normal(num_persons), "class": (bend[:, 0] == bends[1]) + 1}
    )


def test_estimates_lie_within_three_standard_errors_of_the_truth(model, frame):
    truth = pd.Series(true_parameters()).reindex(model.summary_.index)
    assert truth.notna().all()
    z = (model.summary_["estimate"] - truth) / model.summary_["se"]
    assert (z.abs() < 3).mean() >= 0.97
    assert (z.abs() < 1.96).mean() >= 0.85
    assert (model.predict(frame) == frame["class"]).mean() > 0.85
    assert model.converged_


def test_em_reaches_the_optimum_of_l_bfgs(model, frame):
    em = TrajectoryMoE(2, **FULL, n_init=1, method="em").fit(frame)
    assert em.log_likelihood_ == pytest.approx(model.log_likelihood_, abs=1e-3)
    np.testing.assert_allclose(em.summary_["estimate"], model.summary_["estimate"], atol=0.02)


def test_nested_variants_are_nested(model, frame):
    gate = TrajectoryMoE(2, gate=FULL["gate"], n_init=1).fit(frame)
    experts = TrajectoryMoE(2, experts=FULL["experts"], n_init=1).fit(frame)
    none = TrajectoryMoE(2, n_init=1).fit(frame)
    assert model.log_likelihood_ > experts.log_likelihood_ > none.log_likelihood_
    assert model.log_likelihood_ > gate.log_likelihood_ > none.log_likelihood_
    assert [m.num_parameters_ for m in (model, gate, experts, none)] == [37, 25, 35, 23]
    table = compare_fits({"full": model, "gate": gate, "experts": experts, "none": none})
    assert table["log_likelihood"].idxmax() == "full"
    assert table["BIC"].is_monotonic_increasing
    assert 0.7 < latent_kappa(model, none, frame) < 1


def test_information_criteria_are_their_formulas(model, frame):
    assert model.bic(frame) == pytest.approx(model.bic_)
    assert model.bic_ == pytest.approx(-2 * model.score(frame) * 300 + 37 * np.log(300))
    assert model.aic_ == pytest.approx(-2 * model.score(frame) * 300 + 2 * 37)


def test_one_linear_class_on_a_balanced_table_has_the_closed_form():
    """Means are those of the persons' own lines, with their standard errors."""
    rng = np.random.default_rng(0)
    t, own = np.arange(5.0), rng.multivariate_normal([3, 1], [[2, 0.3], [0.3, 0.5]], 150)
    y = own[:, :1] + own[:, 1:] * t + rng.normal(0, 0.7, (150, 5))
    table = pd.DataFrame(y, columns=[f"Y{j}" for j in range(5)]).assign(**{f"T{j}": t[j] for j in range(5)})
    fitted = TrajectoryMoE(1, "linear").fit(table).summary_.loc["class 1"]
    lines = np.polynomial.polynomial.polyfit(t, y.T, 1)
    np.testing.assert_allclose(fitted["estimate"][["intercept", "slope"]], lines.mean(1), atol=1e-4)
    np.testing.assert_allclose(fitted["se"][["intercept", "slope"]], lines.std(1) / np.sqrt(150), rtol=1e-3)
    residual = ((y.T - np.polynomial.polynomial.polyval(t, lines).T) ** 2).sum() / (150 * 3)
    assert fitted["estimate"]["residual variance"] == pytest.approx(residual, rel=1e-4)


@pytest.mark.parametrize(
    ("curve", "bends", "make"),
    [
        ("exponential", (0.3, 0.9), lambda t, r, e: 10 + e[0] + (8 + e[1]) * (1 - np.exp(-r * t))),
        (
            "jenss_bayley",
            (-1.5, -0.5),
            lambda t, c, e: 10 + e[0] + (2 + 0.3 * e[1]) * t - 8 * (np.exp(c * t) - 1),
        ),
    ],
)
def test_nonlinear_curves_recover_their_bend(curve, bends, make):
    table = curves(150, make, bends=bends)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Jenss-Bayley: early growth has no variance here
        fitted = TrajectoryMoE(2, curve, n_init=1).fit(table)
    name = {"exponential": "rate", "jenss_bayley": "decay"}[curve]
    np.testing.assert_allclose(fitted.summary_["estimate"].xs(name, level="parameter"), bends, rtol=0.1)
    assert (fitted.predict(table) == table["class"]).mean() > 0.95


@pytest.mark.parametrize("curve", ["linear", "quadratic"])
def test_polynomials_recover_classes_ordered_by_height(curve):
    table = curves(
        120,
        lambda t, b, e: 5 + e[0] + (b + 0.2 * e[1]) * t + (0.1 * t**2 if curve == "quadratic" else 0),
        bends=(1, 3),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the quadratic factor has no variance here
        fitted = TrajectoryMoE(2, curve, n_init=1).fit(table)
    slopes = fitted.summary_["estimate"].xs("slope", level="parameter")
    np.testing.assert_allclose(slopes, [1, 3], atol=0.15)


def test_joint_and_conditional_agree_for_one_class(frame):
    """With one class the covariates' distribution factors out of the likelihood."""
    conditional = TrajectoryMoE(1, experts="ex1 + ex2").fit(frame)
    joint = TrajectoryMoE(1, experts="ex1 + ex2", covariates="joint").fit(frame)
    x = frame[["ex1", "ex2"]].to_numpy()
    covariance = np.cov(x.T, bias=True)
    density = -0.5 * len(x) * (2 * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1] + 2)
    assert joint.log_likelihood_ == pytest.approx(conditional.log_likelihood_ + density, abs=1e-3)
    assert joint.summary_.loc[("class 1", "mean(ex1)"), "estimate"] == pytest.approx(x[:, 0].mean(), abs=1e-4)
    assert joint.summary_.loc[("class 1", "cov(ex1, ex2)"), "estimate"] == pytest.approx(
        covariance[0, 1], abs=1e-4
    )
    with pytest.raises(ValueError, match=r"same data.*modelled covariates: ex1, ex2"):
        compare_fits({"joint": joint, "conditional": conditional})


def test_joint_covariates_tell_classes_apart():
    table = simulate_trajectories(150, seed=4)
    table["ex1"] += 3 * table["class"]
    conditional = TrajectoryMoE(2, experts="ex1", n_init=1).fit(table)
    joint = TrajectoryMoE(2, experts="ex1", covariates="joint", n_init=1).fit(table)
    assert joint.entropy_ > conditional.entropy_ + 0.05
    means = joint.summary_["estimate"].xs("mean(ex1)", level="parameter")
    np.testing.assert_allclose(means, [3, 6], atol=0.4)


def test_a_long_table_gives_what_the_wide_one_gives(model, frame):
    long = to_long(frame)
    fitted = TrajectoryMoE(2, **FULL, y="score", t="time", person="id", n_init=1).fit(long)
    assert fitted.log_likelihood_ == pytest.approx(model.log_likelihood_, abs=1e-4)
    np.testing.assert_allclose(fitted.predict_proba(long), model.predict_proba(frame), atol=1e-3)
    assert fitted.classes(long).index.name == "id"


def test_order_of_persons_does_not_change_the_estimates(model, frame):
    shuffled = frame.sample(frac=1, random_state=0)
    moved = TrajectoryMoE(2, **FULL, n_init=1).fit(shuffled)
    np.testing.assert_allclose(moved.summary_["estimate"], model.summary_["estimate"], atol=0.01)
    np.testing.assert_allclose(
        model.predict_proba(shuffled), model.predict_proba(frame)[shuffled.index.to_numpy()], atol=1e-12
    )


def test_units_of_a_covariate_scale_its_coefficients_and_nothing_else(model, frame):
    scaled = frame.assign(gx1=1000 * frame["gx1"] + 5, ex2=frame["ex2"] / 100)
    fitted = TrajectoryMoE(2, **FULL, n_init=1).fit(scaled)
    assert fitted.log_likelihood_ == pytest.approx(model.log_likelihood_, abs=1e-4)
    for where, name, factor in (("gate 2 vs 1", "gx1", 1e-3), ("class 2", "slope 2 ~ ex2", 100)):
        np.testing.assert_allclose(
            fitted.summary_.loc[(where, name), ["estimate", "se"]],
            factor * model.summary_.loc[(where, name), ["estimate", "se"]],
            rtol=0.02,
        )


def test_missing_occasions_are_left_out_and_nobody_is(frame):
    holes = frame.copy()
    rng = np.random.default_rng(0)
    for j in range(2, 11):
        holes.loc[rng.random(300) < 0.25, f"Y{j}"] = np.nan
    holes.loc[0, [f"Y{j}" for j in range(2, 11)]] = np.nan  # seen once
    holes.loc[holes["Y3"].isna(), "T3"] = np.nan
    fitted = TrajectoryMoE(2, **FULL, n_init=1).fit(holes)
    assert fitted.num_persons_ == 300
    assert fitted.num_scores_ == int(holes.filter(regex="^Y").notna().sum().sum())
    knots = fitted.summary_["estimate"].xs("knot", level="parameter")
    np.testing.assert_allclose(knots, [3.5, 5.5], atol=0.25)


def test_effects_of_time_varying_covariates_are_recovered():
    table = simulate_trajectories(150, seed=3)
    rng = np.random.default_rng(0)
    for j in range(1, 11):
        table[f"X{j}"] = rng.standard_normal(150)
        table[f"Y{j}"] += np.where(table["class"] == 1, 0.5, -0.5) * table[f"X{j}"]
    fitted = TrajectoryMoE(2, tvc="X", n_init=1).fit(table)
    np.testing.assert_allclose(
        fitted.summary_["estimate"].xs("score ~ X", level="parameter"), [0.5, -0.5], atol=0.15
    )
    with pytest.raises(ValueError, match="a Y without its X for row=0"):
        fitted.predict(table.assign(X4=np.nan))


def test_growth_factors_are_close_to_the_persons_own(model, frame):
    found = model.growth_factors(frame)
    assert list(found.columns) == ["intercept", "slope 1", "slope 2", "knot"]
    assert np.corrcoef(found["intercept"], frame["Y1"])[0, 1] > 0.95
    assert found["knot"].between(3.3, 5.7).all()


def test_texts_become_dummies_and_unseen_ones_are_refused(frame):
    often = np.random.default_rng(0).random(300) < 0.9
    table = frame.assign(sex=np.where((frame["class"] == 1) == often, "f", "m"))
    fitted = TrajectoryMoE(2, gate="sex + gx1", n_init=1).fit(table)
    assert fitted.summary_.loc[("gate 2 vs 1", "sex=m"), "low"] > 2  # ln 81 = 4.4
    with pytest.raises(ValueError, match="covariate 'sex' is 'x'; fitted were f, m"):
        fitted.predict(table.assign(sex="x"))


def test_a_saved_model_is_the_same_model(model, frame, tmp_path):
    loaded = TrajectoryMoE.load(model.save(tmp_path / "model"))
    assert loaded.summary() == model.summary()
    pd.testing.assert_frame_equal(loaded.summary_, model.summary_)
    np.testing.assert_array_equal(loaded.predict_proba(frame), model.predict_proba(frame))
    assert {file.suffix for file in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}


def test_summary_and_plot_show_classes(model, frame, tmp_path):
    text = model.summary()
    assert "gate 2 vs 1 (log odds)" in text
    assert f"{np.exp(model.summary_.loc[('gate 2 vs 1', 'gx1'), 'estimate']):.4g}" in text
    assert model.plot(frame, tmp_path / "classes.png").stat().st_size > 10_000
    drawn = model.mean_curves(11)
    assert drawn.groupby("class")["y"].first().between(97, 103).all()


def test_fitting_is_deterministic_and_leaves_global_random_states_alone(frame):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    fits = [TrajectoryMoE(2, "linear", n_init=2, random_state=3).fit(frame.head(80)) for _ in range(2)]
    assert fits[0].starts_ == pytest.approx(fits[1].starts_, rel=1e-9)
    after = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert after == (torch.rand(1), np.random.rand())  # noqa: NPY002


def test_a_class_of_one_person_is_refused():
    table = curves(150, lambda t, b, e: 5 + e[0] + (b + 0.2 * e[1]) * t, bends=(1, 1))
    table.loc[7, [f"Y{j}" for j in range(8)]] += 500
    with pytest.raises(
        DegenerateClassError, match="2 classes kept under 1% of 150 persons; use fewer classes"
    ):
        TrajectoryMoE(2, "linear", n_init=2).fit(table)


def test_standard_errors_are_missing_exactly_where_the_data_say_nothing(model):
    size = sum(parameter.numel() for parameter in model.model_.parameters())
    flat = np.eye(size)
    flat[0, 0] = 0.0  # no curvature along the first parameter

    def quantities(moved: GrowthMixture) -> torch.Tensor:
        first, *_, last = moved.parameters()
        return torch.stack([first.flatten()[0], last.flatten()[0], first.flatten()[0] + last.flatten()[0]])

    variances = np.diag(natural_covariance(model.model_, flat, quantities))
    assert np.isnan(variances).tolist() == [True, False, True]
    assert variances[1] == pytest.approx(1)


def test_observed_information_is_the_derivative_of_the_gradient(model, frame):
    panel = model._panel(frame)
    parameters = list(model.model_.parameters())
    found = information(model.model_, panel)

    def slope() -> np.ndarray:
        value = -model.model_.log_likelihood(panel).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]).numpy()

    knots = [name for name, _ in model.model_.named_parameters()].index("bend")
    place = sum(parameter.numel() for parameter in parameters[:knots])
    with torch.no_grad():
        parameters[knots][0] += 1e-5
    above = slope()
    with torch.no_grad():
        parameters[knots][0] -= 2e-5
    below = slope()
    with torch.no_grad():
        parameters[knots][0] += 1e-5
    np.testing.assert_allclose((above - below) / 2e-5, found[place], rtol=1e-3, atol=1e-2)
    assert np.linalg.eigvalsh(found).min() > 0


def test_the_number_of_classes_is_chosen_by_bic_without_covariates(frame):
    table = select_n_classes(frame, [1, 2], n_init=1)
    assert table.index.tolist() == [2, 1]
    with pytest.warns(UserWarning, match="without gate= and experts="):
        select_n_classes(frame, [1], experts="ex1")


def test_kappa_is_one_for_relabelled_classes_and_classes_align(model, frame):
    assert latent_kappa(model, model, frame) == 1
    weights = model.posterior(frame).weights
    assert align_classes(weights, weights[:, [1, 0]]) == [1, 0]
    assert entropy_index(torch.ones(3, 1)) == 1


def test_a_knot_at_the_end_is_warned_about():
    def late(t, bend, e):
        return 5 + e[0] + (2 + 0.2 * e[1]) * np.minimum(t, 6.6) + (4 + 0.5 * e[1]) * np.maximum(t - 6.6, 0)

    table = curves(100, late, bends=(0, 0))
    with pytest.warns(UserWarning, match=r"knot of class 1, 6.* lies within one occasion of an end"):
        TrajectoryMoE(1).fit(table)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: f.assign(T4=f["T3"]), {}, "times must increase for row=0"),
        (lambda f: f.drop(columns="T10"), {}, "'Y' has 10 numbered columns .* but 'T' has 9"),
        (lambda f: f.drop(columns=[f"Y{j}" for j in range(1, 11)]), {}, "no columns Y1, Y2"),
        (
            lambda f: f[[f"{p}{j}" for p in "YT" for j in (1, 2, 3)]],
            {},
            "3 occasions with .* needs at least 4",
        ),
        (lambda f: f.assign(gx1=[np.nan, *f["gx1"][1:]]), {"gate": "gx1"}, "'gx1' is missing .* first for 0"),
        (lambda f: f.assign(gx1=2.0), {"gate": "gx1"}, "'gx1' is 2 in every row"),
        (lambda f: f.assign(c=2 * f["gx1"] + 1), {"gate": "gx1 + c"}, "determine each other"),
        (lambda f: f, {"gate": "gx3"}, "no column 'gx3'"),
        (lambda f: f, {"gate": "gx1 + + gx2"}, "empty term"),
        (lambda f: f, {"gate": "gx1 + gx1"}, "names 'gx1' twice"),
        (
            lambda f: f.assign(Y3=np.where(f.index == 4, "x", f["Y3"].astype(object))),
            {},
            "'Y3', row 4: 'x' where",
        ),
        (lambda f: f.assign(T3=np.where(f.index == 4, np.nan, f["T3"])), {}, "a Y without its T for row=4"),
        (lambda f: f.head(20), {}, "2 classes have 23 parameters, more than 20 persons"),
        (lambda f: f.head(0), {}, "no rows"),
        (lambda f: f, {"curve": "cubic"}, "curve='cubic'; use one of linear"),
        (lambda f: f, {"n_classes": 0}, "n_classes=0"),
        (
            lambda f: f,
            {"covariates": "joint", "gate": "gx1", "experts": "gx1"},
            "'joint' with gx1 in gate and experts",
        ),
        (lambda f: f, {"covariates": "joint"}, "give experts="),
        (lambda f: f, {"n_classes": 1, "gate": "gx1"}, "one class needs no gate"),
        (
            lambda f: f.assign(**{f"T{j}": f[f"T{j}"] + 60 for j in range(1, 11)}),
            {"curve": "exponential"},
            "times run from 60 to 69; .* subtract",
        ),
    ],
)
def test_bad_tables_and_options_are_refused(frame, change, options, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryMoE(**options).fit(change(frame))


def test_bad_long_tables_are_refused(frame):
    long = to_long(frame)
    options = {"y": "score", "t": "time", "person": "id"}
    with pytest.raises(ValueError, match="times must increase for id=1"):
        TrajectoryMoE(**options).fit(long.iloc[::-1].sort_values("id", kind="stable"))
    with pytest.raises(ValueError, match="'wave' changes over time for id=1"):
        TrajectoryMoE(gate="wave", **options).fit(long)
    with pytest.raises(ValueError, match="the person is missing"):
        TrajectoryMoE(**options).fit(long.assign(id=[np.nan, *long["id"][1:]]))


def test_an_unfitted_model_says_so(frame):
    with pytest.raises(ValueError, match="call fit first"):
        TrajectoryMoE().predict(frame)
