"""The program's answer is the best there is, within the budget, with every wanted choice taken."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from coterie.shrink import cheapest_choices


def brute_force(costs, sizes, budget, wanted):
    best = math.inf
    for chosen in itertools.product(range(len(sizes)), repeat=len(costs)):
        if sum(sizes[j] for j in chosen) <= budget and set(wanted) <= set(chosen):
            best = min(best, sum(row[j] for row, j in zip(costs, chosen, strict=True)))
    return best


@given(
    items=st.integers(1, 5),
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    budget=st.integers(-1, 20),
    wanted=st.sets(st.integers(0, 2)),
    seed=st.integers(0, 1000),
)
def test_no_choice_within_the_budget_is_cheaper(items, sizes, budget, wanted, seed):
    wanted = sorted(w for w in wanted if w < len(sizes))
    costs = np.random.default_rng(seed).integers(0, 20, (items, len(sizes)))
    best = brute_force(costs, sizes, budget, wanted)
    if math.isinf(best):
        with pytest.raises(ValueError, match="nothing fits"):
            cheapest_choices(costs, sizes, budget, at_least_one=wanted)
        return
    chosen = cheapest_choices(costs, sizes, budget, at_least_one=wanted)
    assert sum(costs[i, j] for i, j in enumerate(chosen)) == best
    assert sum(sizes[j] for j in chosen) <= budget
    assert set(wanted) <= set(chosen)


@pytest.mark.parametrize("seed", range(3))
def test_a_solver_of_integer_programs_finds_nothing_cheaper_for_64_experts(seed):
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.lognormal(sigma=2, size=(64, 3)))[:, ::-1].copy()
    one_each = np.kron(np.eye(64), np.ones((1, 3)))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(np.tile([[1, 2, 3]], 64), ub=130),
        LinearConstraint(np.tile(np.eye(3)[1:], 64), lb=1),
    ]
    exact = {"mip_rel_gap": 0}  # HiGHS stops within 0.01% of the best otherwise
    solved = milp(costs.ravel(), integrality=1, bounds=Bounds(0, 1), constraints=constraints, options=exact)
    chosen = cheapest_choices(costs, [1, 2, 3], 130, at_least_one=[1, 2])
    assert costs[range(64), chosen].sum() == pytest.approx(solved.fun, rel=1e-9)


def test_of_equal_answers_the_smaller_choice_comes_first():
    assert cheapest_choices(np.zeros((3, 2)), [1, 2], 9) == [0, 0, 0]
    assert cheapest_choices(np.zeros((3, 2)), [1, 2], 9, at_least_one=[1]) == [0, 0, 1]


def test_costs_must_be_finite_and_fit_the_sizes():
    with pytest.raises(ValueError, match="1 of 4 costs are not finite"):
        cheapest_choices([[1, math.nan], [1, 2]], [1, 2], 4)
    with pytest.raises(ValueError, match=r"\(2, 2\); 3 sizes take \[items, 3\]"):
        cheapest_choices([[1, 2], [1, 2]], [1, 2, 3], 4)


def test_all_experts_of_48_layers_at_once_get_what_a_price_per_bit_proves_best():
    """Whoever pays a price per bit takes the cheapest choice for each expert alone; with a budget of just the
    bits that this takes, nothing is cheaper, or paying the price it would be, too."""
    items, sizes = 48 * 128, np.array([1, 2, 3])
    costs = np.sort(np.random.default_rng(0).lognormal(sigma=2, size=(items, 3)))[:, ::-1]
    alone = (costs + 0.7 * sizes).argmin(1)
    budget = int(sizes[alone].sum())
    assert set(alone.tolist()) == {0, 1, 2}
    assert cheapest_choices(costs, sizes.tolist(), budget, at_least_one=[1, 2]) == alone.tolist()
    less = cheapest_choices(costs, sizes.tolist(), budget - 1, at_least_one=[1, 2])
    loss = costs[range(items), less].sum() - costs[range(items), alone].sum()
    assert sizes[less].sum() == budget - 1
    assert loss > 0.7 - 1e-9  # the dearest bit that was left out is worth more than its price


def test_no_item_needs_no_budget():
    assert cheapest_choices(np.zeros((0, 2)), [1, 2], 0) == []
    with pytest.raises(ValueError, match=r"nothing fits: 0 items .* choices \[1\] at least once each"):
        cheapest_choices(np.zeros((0, 2)), [1, 2], 0, at_least_one=[1])
