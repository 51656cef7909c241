"""Losses of unlearning against plain formulas in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from coterie.tune import METHODS, Batch, Given, objective
from coterie.tune.losses import control_vector, divergence, drift, misdirection, npo

B, S, V, D = 3, 6, 11, 4


@pytest.fixture
def batch():
    present = torch.ones(B, S, dtype=torch.bool)
    present[1, 4:] = False
    scored = torch.rand(B, S) < 0.7
    scored[:, 2] = True
    return Batch(torch.randint(V, (B, S)), present_BS=present, scored_BS=scored)


def given():
    return Given(torch.randn(B, S, V, requires_grad=True), torch.randn(B, S, D))


def log_likelihoods(one, batch):
    """Of each sequence, and how many tokens they are of, by a loop."""
    chances, sums, tokens = one.logits_BSV.detach().double().log_softmax(-1), [0.0] * B, 0
    for b in range(B):
        for s in range(1, S):
            if batch.present_BS[b, s] and batch.scored_BS[b, s]:
                sums[b] += chances[b, s - 1, batch.ids_BS[b, s]].item()
                tokens += 1
    return sums, tokens


def test_ascent_and_difference_are_cross_entropies_of_the_tokens_that_count(batch):
    now = given()
    sums, tokens = log_likelihoods(now, batch)
    whole = objective("gdiff")
    assert whole.forget(now, None, batch).item() == pytest.approx(sum(sums) / tokens, rel=1e-5)
    assert whole.retain(now, None, batch).item() == pytest.approx(-sum(sums) / tokens, rel=1e-5)


@pytest.mark.parametrize("beta", [0.001, 0.1, 2.0])
def test_npo_is_its_formula(batch, beta):
    now, before = given(), given()
    ratios = [
        a - b for a, b in zip(log_likelihoods(now, batch)[0], log_likelihoods(before, batch)[0], strict=True)
    ]
    expected = -2 / beta * sum(-math.log1p(math.exp(beta * r)) for r in ratios) / B
    assert npo(now, before, batch, beta=beta).item() == pytest.approx(expected, rel=1e-4)


def test_npo_with_a_small_beta_is_ascent_of_sequences(batch):
    now, before = given(), given()
    (by_npo,) = torch.autograd.grad(npo(now, before, batch, beta=1e-5), now.logits_BSV)
    targets = batch.targets().flatten()
    summed = -F.cross_entropy(now.logits_BSV[:, :-1].flatten(0, 1), targets, reduction="sum") / B
    (by_ascent,) = torch.autograd.grad(summed, now.logits_BSV)
    torch.testing.assert_close(by_npo, by_ascent, rtol=1e-3, atol=1e-6)


def test_divergence_and_drift_are_zero_for_the_model_as_it_was_and_count_no_padding(batch):
    now = given()
    assert divergence(now, now, batch).item() == pytest.approx(0, abs=1e-6)
    assert drift(now, now, batch).item() == 0
    moved = Given(now.logits_BSV.detach().clone(), now.hidden_BSD.clone())
    moved.logits_BSV[1, 4:] += torch.randn(2, V)
    moved.hidden_BSD[1, 4:] += 1
    assert divergence(moved, now, batch).item() == pytest.approx(0, abs=1e-6)
    assert drift(moved, now, batch).item() == 0
    moved.hidden_BSD[0] += 1
    assert drift(moved, now, batch).item() == pytest.approx(S * D / (B * S - 2), rel=1e-5)


def test_divergence_is_its_formula(batch):
    now, before = given(), given()
    p, q = (one.logits_BSV.detach().double().softmax(-1) for one in (before, now))
    rows = [
        (p[b, s - 1] * (p[b, s - 1] / q[b, s - 1]).log()).sum().item()
        for b in range(B)
        for s in range(1, S)
        if batch.present_BS[b, s] and batch.scored_BS[b, s]
    ]
    assert divergence(now, before, batch).item() == pytest.approx(sum(rows) / len(rows), rel=1e-4)


def test_rmu_leads_to_a_vector_as_long_as_was_asked(batch):
    now = given()
    control = control_vector(now.hidden_BSD, batch, scale=3.0, seed=0)
    mean = now.hidden_BSD[batch.present_BS].norm(dim=-1).mean()
    assert control.norm().item() == pytest.approx(3 * mean.item(), rel=1e-5)
    assert bool((control >= 0).all())
    there = Given(now.logits_BSV, control.expand(B, S, D))
    assert misdirection(there, None, batch, control_D=control).item() == 0


def test_what_each_method_needs():
    for method in METHODS:
        whole = objective(method, control_D=torch.ones(D))
        assert (whole.retain is None) == (method == "ga")
        assert objective(method, control_D=torch.ones(D), retain_weight=0.0).retain is None
    with pytest.raises(ValueError, match="rmu needs control_D"):
        objective("rmu")
    with pytest.raises(ValueError, match="no method 'magic'; use one of ga, gdiff, npo, rmu, kl"):
        objective("magic")
