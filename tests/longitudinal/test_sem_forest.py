"""The forest finds what makes trajectories differ, and only that."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chi2

from coterie.longitudinal import SemForest
from coterie.longitudinal.forest import Leaf, Split, _score_statistics


def make_table(num_persons: int = 240) -> pd.DataFrame:
    """Linear growth; a school's slope is steeper in 'north', nothing else matters."""
    rng = np.random.default_rng(0)
    columns: dict[str, object] = {
        "school": rng.choice(["east", "north", "west"], num_persons),
        "age": rng.normal(6, 0.3, num_persons),
        "noise": rng.standard_normal(num_persons),
    }
    slope = 1 + 1.5 * (columns["school"] == "north") + 0.4 * rng.standard_normal(num_persons)
    start = rng.normal(10, 1, num_persons)
    for j in range(5):
        columns |= {f"T{j}": np.full(num_persons, float(j))}
        columns |= {f"Y{j}": start + slope * j + rng.normal(0, 0.5, num_persons)}
    return pd.DataFrame(columns)


def test_the_covariate_that_matters_comes_first_and_the_others_weigh_nothing():
    forest = SemForest("linear", n_trees=4, depth=1, min_leaf=20).fit(
        make_table(), ["noise", "age", "school"]
    )
    assert forest.importances_.index[0] == "school"
    assert forest.importances_["school"] > 0.1
    assert forest.importances_[["noise", "age"]].abs().max() < 0.03
    assert all(isinstance(tree, Split) for tree in forest.trees_)


def test_nothing_is_split_where_nothing_matters_or_leaves_would_be_too_small():
    table = make_table()
    quiet = SemForest("linear", n_trees=2, depth=2, alpha=1e-3).fit(table, ["noise"])
    assert all(isinstance(tree, Leaf) for tree in quiet.trees_)
    assert quiet.importances_["noise"] == 0
    small = SemForest("linear", n_trees=2, min_leaf=76).fit(table, ["school"])
    assert all(isinstance(tree, Leaf) for tree in small.trees_)


def test_score_statistic_is_chi_squared_where_a_cut_does_not_matter():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((400, 3)) @ rng.standard_normal((3, 3))
    scores -= scores.mean(0)  # as at an optimum
    below = rng.random((2000, 400)) < 0.4
    p = chi2.sf(_score_statistics(scores, below), 3)
    assert abs((p < 0.1).mean() - 0.1) < 0.02
    assert abs(p.mean() - 0.5) < 0.03


def test_the_forest_is_deterministic_and_leaves_torch_alone():
    torch.manual_seed(1)
    runs = [
        SemForest("linear", n_trees=2, depth=1, min_leaf=20).fit(make_table(), ["school"]) for _ in range(2)
    ]
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1)
    first, second = (run.importances_["school"] for run in runs)
    assert first == pytest.approx(
        second, rel=1e-9
    )  # sums in memory of another alignment differ in the last bit


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="no covariates"):
        SemForest("linear").fit(make_table(), [])
    with pytest.raises(ValueError, match="240 persons for leaves of min_leaf=100"):
        SemForest("linear", min_leaf=100).fit(make_table(), ["age"])
    with pytest.raises(ValueError, match="n_trees=0"):
        SemForest("linear", n_trees=0)
    with pytest.raises(ValueError, match="curve='line'"):
        SemForest("line")  # type: ignore[arg-type]
