"""The mixture's densities against plain loops over persons with scipy's multivariate normal."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from coterie.longitudinal.curves import CURVES
from coterie.longitudinal.estimation import evaluate_at, m_step
from coterie.longitudinal.growth_mixture import GrowthMixture
from coterie.longitudinal.panel import Panel

PERSONS, OCCASIONS, WIDTH = 7, 6, 3


def make_panel(*, num_tvc: int = 1, seed: int = 0) -> Panel:
    """Seven persons, some scores missing."""
    rng = np.random.default_rng(seed)
    seen = torch.from_numpy((rng.random((PERSONS, OCCASIONS)) < 0.8).astype(float))
    seen[:, 0] = 1
    t = torch.arange(OCCASIONS) + torch.from_numpy(rng.uniform(0, 0.4, (PERSONS, OCCASIONS)))
    design = np.column_stack([np.ones(PERSONS), rng.standard_normal((PERSONS, WIDTH - 1))])
    return Panel(
        y=torch.from_numpy(rng.normal(5, 2, (PERSONS, OCCASIONS))) * seen,
        t=t * seen,
        seen=seen,
        gate=torch.from_numpy(design),
        experts=torch.from_numpy(design[:, ::-1].copy()[:, [2, 0, 1]]),
        tvc=torch.from_numpy(rng.standard_normal((PERSONS, OCCASIONS, num_tvc))) * seen[..., None],
        persons=tuple(range(PERSONS)),
    )


def make_model(
    panel: Panel, curve: str = "bilinear", *, classes: int = 3, joint: bool = False
) -> GrowthMixture:
    """Random parameters, units other than one."""
    units = torch.eye(WIDTH, dtype=torch.float64)
    units[1, 0], units[1, 1] = -0.5, 2.0
    model = GrowthMixture(
        CURVES[curve],
        classes,
        gate_units=units,
        expert_units=units,
        scale=torch.linspace(1.5, 0.5, len(CURVES[curve].factors), dtype=torch.float64),
        times=panel.time_range,
        num_tvc=panel.tvc.shape[2],
        least_variance=0.01,
        joint=joint,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
    return model


def plain_density(model: GrowthMixture, panel: Panel, row: int, k: int) -> float:
    """log N(y; Λ B x + κ z, Λ Ψ Λ' + θ I) of the scores that were seen, one person and class at a time."""
    seen = panel.seen[row].bool()
    loadings = model.curve.loadings(panel.t, model.bend_K())[row, k][seen].detach().numpy()
    mean = loadings @ model.mean_KPC()[k].detach().numpy() @ panel.experts[row].numpy()
    if model.tvc is not None:
        mean = mean + panel.tvc[row][seen].numpy() @ model.tvc[k].detach().numpy()
    root = model.root_KPP()[k].detach().numpy()
    covariance = loadings @ root @ root.T @ loadings.T + model.variance_K()[k].item() * np.eye(
        int(seen.sum())
    )
    return float(multivariate_normal(mean, covariance).logpdf(panel.y[row][seen].numpy()))


@pytest.mark.parametrize("curve", CURVES)
def test_density_is_that_of_a_loop_over_persons_and_classes(curve):
    panel = make_panel()
    model = make_model(panel, curve)
    expected = [[plain_density(model, panel, row, k) for k in range(3)] for row in range(PERSONS)]
    torch.testing.assert_close(model.log_density(panel), torch.tensor(expected, dtype=torch.float64))


def test_log_likelihood_mixes_densities_with_a_multinomial_logit_against_the_first_class():
    panel = make_panel()
    model = make_model(panel)
    natural = model.natural()
    table = (panel.gate @ torch.linalg.inv(model.gate_units).T).numpy()  # the design in the table's units
    for row in range(PERSONS):
        odds = np.exp(np.r_[0.0, natural["gate"].detach().numpy() @ table[row]])
        densities = np.exp([plain_density(model, panel, row, k) for k in range(3)])
        joint = odds / odds.sum() * densities
        assert model.log_likelihood(panel)[row].item() == pytest.approx(np.log(joint.sum()), abs=1e-9)
        posterior = model.posterior(panel).validate().weights[row].detach().numpy()
        np.testing.assert_allclose(posterior, joint / joint.sum(), atol=1e-9)


def test_joint_density_adds_that_of_the_covariates_in_the_tables_units():
    panel = make_panel()
    model = make_model(panel, joint=True)
    natural = {name: value.detach().numpy() for name, value in model.natural().items()}
    x = (panel.experts @ torch.linalg.inv(model.expert_units).T).numpy()[:, 1:]
    for k in range(3):
        density = multivariate_normal(
            natural["covariate_mean"][k], natural["covariate_covariance"][k]
        ).logpdf(x)
        scores = [plain_density(model, panel, row, k) for row in range(PERSONS)]
        np.testing.assert_allclose(model.log_density(panel)[:, k].detach(), density + scores, atol=1e-9)


def test_bilinear_curve_is_the_papers_reparameterised_one():
    """η' = (η0 + γ η1, (η1 + η2) / 2, (η2 - η1) / 2) on [1, t - γ, |t - γ|], transformed back."""
    knot = 2.3
    t = torch.linspace(0, 5, 11, dtype=torch.float64)
    loadings = CURVES["bilinear"].loadings(t[None], torch.tensor([knot], dtype=torch.float64))[0, 0].numpy()
    past = t.numpy() - knot
    paper = np.column_stack([np.ones(11), past, np.sqrt(past**2 + 1e-8)])
    back = np.array([[1, -knot, knot], [0, 1, -1], [0, 1, 1]])
    factors = np.array([4.0, 1.5, 0.3])
    primed = np.array([factors[0] + knot * factors[1], factors[1:].sum() / 2, (factors[2] - factors[1]) / 2])
    np.testing.assert_allclose(back @ primed, factors, atol=1e-12)
    np.testing.assert_allclose(loadings @ factors, paper @ primed, atol=1e-12)
    np.testing.assert_allclose(loadings @ back, paper, atol=1e-12)  # hence the same covariance, too
    broken = np.where(t.numpy() < knot, 4 + 1.5 * t.numpy(), 4 + 1.5 * knot + 0.3 * past)
    np.testing.assert_allclose(loadings @ factors, broken, atol=1e-3)


@pytest.mark.parametrize("joint", [False, True])
def test_gradients_of_every_parameter_are_those_of_finite_differences(joint):
    panel = make_panel()
    model = make_model(panel, joint=joint)
    start = parameters_to_vector(model.parameters()).detach()
    assert torch.autograd.gradcheck(
        lambda flat: evaluate_at(model, flat, lambda moved: moved.log_likelihood(panel)),
        start.requires_grad_(),
        eps=1e-6,
        atol=1e-6,
    )


def test_gradient_of_the_knot_is_smooth_across_an_occasion():
    """At a knot on an occasion of everybody the raw bilinear form has no derivative."""
    panel = make_panel(num_tvc=0)
    on_grid = Panel(**{**vars(panel), "t": torch.arange(OCCASIONS).double() * panel.seen})
    model = make_model(on_grid, classes=1)
    values = []
    for knot in (2 - 1e-3, 2.0, 2 + 1e-3):
        with torch.no_grad():
            model.bend.fill_(
                float(torch.logit((torch.tensor(knot) - model.bounds[0]) / model.bounds.diff()[0]))
            )
        (slope,) = torch.autograd.grad(model.log_likelihood(on_grid).sum(), model.bend)
        values.append(float(slope))
    assert np.isfinite(values).all()
    assert min(values[0], values[2]) - 1e-6 <= values[1] <= max(values[0], values[2]) + 1e-6


def test_growth_factors_are_the_conditional_mean_of_the_normal_model():
    panel = make_panel()
    model = make_model(panel, classes=2)
    found = model.factors(panel).detach().numpy()
    for row in range(PERSONS):
        for k in range(2):
            seen = panel.seen[row].bool()
            loadings = model.curve.loadings(panel.t, model.bend_K())[row, k][seen].detach().numpy()
            root = model.root_KPP()[k].detach().numpy()
            mean = model.mean_KPC()[k].detach().numpy() @ panel.experts[row].numpy()
            covariance = loadings @ root @ root.T @ loadings.T
            covariance += model.variance_K()[k].item() * np.eye(len(loadings))
            rest = panel.y[row][seen].numpy() - loadings @ mean
            rest -= panel.tvc[row][seen].numpy() @ model.tvc[k].detach().numpy()
            expected = mean + root @ root.T @ loadings.T @ np.linalg.solve(covariance, rest)
            np.testing.assert_allclose(found[row, k], expected, atol=1e-9)


@given(st.permutations(range(PERSONS)))
def test_order_of_persons_does_not_matter(order):
    panel = make_panel()
    model = make_model(panel)
    moved = model.log_joint(panel.take(np.array(order)))
    torch.testing.assert_close(moved, model.log_joint(panel)[list(order)])


@given(st.permutations(range(3)))
def test_relabelled_classes_are_the_same_model(order):
    panel = make_panel()
    model = make_model(panel, joint=True)
    before, posterior = model.log_likelihood(panel).detach(), model.posterior(panel).weights.detach()
    model.reorder(list(order))
    torch.testing.assert_close(model.log_likelihood(panel).detach(), before)
    torch.testing.assert_close(model.posterior(panel).weights.detach(), posterior[:, list(order)])


def test_densities_stay_finite_where_their_exponentials_underflow():
    panel = make_panel()
    far = Panel(**{**vars(panel), "y": panel.y * 1e4})
    model = make_model(far)
    assert model.log_likelihood(far).max() < -1e5  # exp of that is 0
    assert model.log_likelihood(far).isfinite().all()
    torch.testing.assert_close(model.posterior(far).weights.sum(1), torch.ones(PERSONS, dtype=torch.float64))


def test_an_m_step_never_lowers_the_expected_log_likelihood():
    panel = make_panel()
    model = make_model(panel, classes=2)
    weights = model.posterior(panel).weights.detach()
    before = (weights * model.log_joint(panel)).sum().item()
    start = parameters_to_vector(model.parameters()).detach().clone()
    m_step(model, panel, weights, iterations=3)
    assert (weights * model.log_joint(panel)).sum().item() > before
    vector_to_parameters(start, model.parameters())
    assert (weights * model.log_joint(panel)).sum().item() == pytest.approx(before)
