import math

import numpy as np
import pytest
import torch
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from coterie.tabular import (
    burden_gap,
    demographic_parity_gap,
    equalized_odds_gap,
    fairness_report,
)
from coterie.tabular.fairness import penalty


def draw(seed, groups=3, rows=200):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, rows), rng.integers(0, 2, rows), rng.integers(0, groups, rows), rng.random(rows)


@given(st.integers(0, 1000), st.integers(2, 4))
def test_gaps_are_those_of_fairlearn(seed, groups):
    y, yhat, group, scores = draw(seed, groups)
    report = fairness_report(y, yhat, group, scores)
    assert report["dp gap"] == pytest.approx(demographic_parity_difference(y, yhat, sensitive_features=group))
    assert report["eo gap"] == pytest.approx(equalized_odds_difference(y, yhat, sensitive_features=group))
    assert report["auc"] == pytest.approx(roc_auc_score(y, scores))


@given(st.integers(0, 1000))
def test_gaps_know_neither_the_order_of_rows_nor_names_of_groups(seed):
    y, yhat, group, distance = draw(seed)
    order = np.random.default_rng(seed).permutation(len(y))
    names = np.array(["b", "c", "a"])[group]
    for gap in (
        lambda y, yhat, g, d: demographic_parity_gap(yhat, g),
        lambda y, yhat, g, d: equalized_odds_gap(y, yhat, g),
        lambda y, yhat, g, d: burden_gap(yhat, d, g),
    ):
        again = gap(y[order], yhat[order], names[order], distance[order])
        assert gap(y, yhat, group, distance) == pytest.approx(again)


def test_with_one_group_or_without_rejected_rows_there_is_no_gap():
    assert math.isnan(demographic_parity_gap([1, 0], ["a", "a"]))
    assert math.isnan(burden_gap([1, 1], [0.0, 0.0], ["a", "b"]))
    assert equalized_odds_gap([1, 1, 0], [1, 0, 1], ["a", "b", "a"]) == 1.0  # one group has no negatives


@pytest.mark.parametrize("kind", ["dp", "eo", "burden"])
@pytest.mark.parametrize("groups", [2, 3])
def test_penalty_is_the_gap_of_probabilities_by_a_plain_loop(kind, groups):
    y, _, group, p = draw(5, groups)

    def gap(values, rows):
        means = [values[rows & (group == g)].mean() for g in range(groups)]
        return max(means) - min(means)

    everyone = np.ones(len(y), dtype=bool)
    expected = {
        "dp": lambda: gap(p, everyone),
        "eo": lambda: gap(p, y == 0) + gap(p, y == 1),
        "burden": lambda: gap(np.maximum(0.5 - p, 0), everyone),
    }[kind]()
    measured = penalty(kind, *map(torch.from_numpy, (p, y, group)))
    assert float(measured) == pytest.approx(expected)


def test_variance_is_the_squared_deviations_from_the_mean_over_all():
    _, y, group, p = draw(3)
    expected = sum((p[group == g].mean() - p.mean()) ** 2 for g in range(3))
    found = penalty("dp", *map(torch.from_numpy, (p, y, group)), how="variance")
    assert float(found) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["dp", "eo", "burden"])
@pytest.mark.parametrize("how", ["range", "variance"])
def test_where_groups_have_no_rows_the_term_is_zero_and_so_is_its_gradient(kind, how):
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    label, group = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([0, 0, 0, -1, -1, -1])
    value = penalty(kind, logits.sigmoid(), label, group, how)
    value.backward()
    assert value.item() == 0
    assert logits.grad.tolist() == [0.0] * 6


def test_equalized_odds_skips_the_label_that_only_one_group_has():
    p, y = torch.tensor([0.9, 0.2, 0.4]), torch.tensor([1, 1, 0])
    assert float(penalty("eo", p, y, torch.tensor([0, 1, 0]))) == pytest.approx(0.7)


def test_the_gradient_closes_the_gap_from_both_sides():
    p = torch.tensor([0.8, 0.6, 0.3], requires_grad=True)
    penalty("dp", p, torch.ones(3), torch.tensor([0, 0, 1])).backward()
    assert p.grad.tolist() == [0.5, 0.5, -1.0]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: demographic_parity_gap([1, 0], ["a"]), "one value per row"),
        (
            lambda: demographic_parity_gap([0.3, 0.9], ["a", "b"]),
            r"yhat holds \[0.3, 0.9\]; should be 0 and 1",
        ),
        (lambda: equalized_odds_gap([2, 1], [0, 1], ["a", "b"]), "y holds"),
        (lambda: burden_gap([0, 1], [1.0], ["a", "b"]), "distance has shape"),
    ],
)
def test_what_cannot_be_compared_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
