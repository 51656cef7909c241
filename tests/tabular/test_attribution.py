from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.tabular.attribution import (
    enumerated_shapley,
    explain_with_gate,
    explain_with_gate_held,
    sampled_shapley,
)
from coterie.tabular.linear_mixture import LinearMixture


def draw(seed, dim, experts, rows=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LinearMixture(dim, experts, "prob").requires_grad_(False)
        model.experts.bias.normal_()
        return model, torch.randn(rows, dim).double(), torch.randn(dim).double()


def by_orders(value, x_D, background_D, blocks):
    """Shapley values as the mean change over every order in which columns can enter."""
    phi, orders = np.zeros(len(blocks)), list(permutations(range(len(blocks))))
    for order in orders:
        z_D = background_D.clone()
        for column in order:
            before = value(z_D)
            z_D[blocks[column]] = x_D[blocks[column]]
            phi[column] += (value(z_D) - before) / len(orders)
    return phi


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4))
def test_closed_form_is_the_shapley_value_of_the_score_with_the_gate_held(seed, dim, experts):
    model, x_TD, background_D = draw(seed, dim, experts)
    blocks = [[0], list(range(1, dim))] if seed % 2 and dim > 1 else [[j] for j in range(dim)]
    phi, phi0, per_expert = explain_with_gate_held(model, x_TD, background_D, blocks)
    for row, x_D in enumerate(x_TD):
        gate_E = model.router(x_D[None]).weights[0]

        def score(z_D, gate_E=gate_E):
            parts = [
                gate_E[e] * (model.experts.weight[e, 0] @ z_D + model.experts.bias[e, 0])
                for e in range(experts)
            ]
            return float(sum(parts))

        assert phi[row] == pytest.approx(by_orders(score, x_D, background_D, blocks), abs=1e-9)
        assert phi0[row] == pytest.approx(score(background_D), abs=1e-9)
        assert phi[row].sum() + phi0[row] == pytest.approx(float(model(x_TD).score_T[row]), abs=1e-9)
    assert per_expert.sum(1) == pytest.approx(phi, abs=1e-12)


@given(st.integers(0, 10**6))
def test_enumeration_is_the_mean_over_all_orders(seed):
    model, x_TD, background_D = draw(seed, 5, 2)
    blocks = [[0, 3], [1], [2, 4]]

    def value(z_TD):
        return model(z_TD).log_odds_T

    phi = enumerated_shapley(value, x_TD, background_D, blocks)
    for row, x_D in enumerate(x_TD):
        expected = by_orders(lambda z_D: float(value(z_D[None])), x_D, background_D, blocks)
        assert phi[row].numpy() == pytest.approx(expected, abs=1e-9)


def test_sampled_values_sum_exactly_and_come_close_with_many_orders():
    model, x_TD, background_D = draw(1, 4, 3)
    blocks = [[0], [1, 2], [3]]

    def value(z_TD):
        return (model.router(z_TD).weights * model(z_TD).scores_TE).sum(1)

    expected = enumerated_shapley(value, x_TD, background_D, blocks).numpy()
    generator = torch.Generator().manual_seed(0)
    for count, tolerance in ((1, 10.0), (500, 0.1)):
        phi, phi0, per_expert = explain_with_gate(model, x_TD, background_D, blocks, count, generator)
        assert phi.sum(1) + phi0 == pytest.approx(value(x_TD).numpy(), abs=1e-9)
        assert per_expert.sum(1) == pytest.approx(phi, abs=1e-12)
        assert np.abs(phi - expected).max() < tolerance


def test_a_linear_function_needs_one_order_and_no_rows_need_none():
    weight_D = torch.tensor([1.0, -2.0, 3.0])
    options = {"permutations": 1, "generator": torch.Generator()}
    x_TD, blocks = torch.ones(2, 3), [[0], [1], [2]]
    sampled = sampled_shapley(lambda z: z @ weight_D, x_TD, torch.zeros(3), blocks, **options)
    assert sampled.phi.tolist() == [[1.0, -2.0, 3.0]] * 2
    none = sampled_shapley(lambda z: z @ weight_D, x_TD[:0], torch.zeros(3), blocks, **options)
    assert none.phi.shape == (0, 3)
