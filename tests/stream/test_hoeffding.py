import numpy as np
import pytest
from river import tree
from river.datasets import synth

from coterie.data import led_drift, sea_drift
from coterie.stream import HoeffdingTrees


def numbered(rows):
    """Rows with their labels as 0 to C-1, and their features as a vector."""
    return [(x, np.array(list(x.values()), dtype=float), int(y)) for x, y in rows]


def agrawal():
    """Nine attributes, three of them codes; leaves become pure, where river forgets their Gaussians."""
    for x, y in synth.Agrawal(classification_function=0, seed=1).take(2500):
        yield {name: float(value) for name, value in x.items()}, y


STREAMS = {
    "sea": lambda: sea_drift(700, seed=1),
    "led": lambda: led_drift(200, seed=2),
    "agrawal": agrawal,
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_tree_in_arrays_predicts_and_splits_as_rivers(name):
    rows = numbered(STREAMS[name]())
    classes = 1 + max(y for *_, y in rows)
    theirs = tree.HoeffdingTreeClassifier(grace_period=50, delta=1e-7)
    ours = HoeffdingTrees(1, len(rows[0][1]), classes)
    for x, x_D, y in rows:
        proba_EC, judged = ours.judge(x_D, x)
        given = theirs.predict_proba_one(x)
        if given:
            expected_C = np.array([given.get(c, 0.0) for c in range(classes)])
            np.testing.assert_allclose(proba_EC[0], expected_C, atol=1e-9)
            assert proba_EC[0].argmax() == expected_C.argmax()
        ours.teach(x_D, x, [0], [y], judged)
        theirs.learn_one(x, y)
    assert ours.num_leaves == [theirs.n_leaves]
    if name == "agrawal":
        assert theirs.n_leaves > 1


def test_one_trees_learning_leaves_the_others_as_they_were():
    trees, x_D = HoeffdingTrees(3, 2, 2), np.array([1.0, 2.0])
    before = trees.judge(x_D, None)[0]
    for y in (0, 1, 1):
        trees.teach(x_D, None, [1], [y], trees.judge(x_D, None)[1])
    after = trees.judge(x_D, None)[0]
    assert (after[[0, 2]] == before[[0, 2]]).all()
    assert (after[1] != before[1]).all()


def test_rows_judged_together_are_judged_as_one_by_one():
    rows = numbered(sea_drift(400, seed=0))
    trees = HoeffdingTrees(4, 3, 2)
    for i, (x, x_D, y) in enumerate(rows):
        trees.teach(x_D, x, [i % 4], [y], trees.judge(x_D, x)[1])
    x_ND = np.array([x_D for _, x_D, _ in rows])
    chosen = [i % 4 for i in range(len(rows))]
    together = trees.judge_rows(chosen, x_ND, None)
    alone = np.array([trees.judge(x_D, None)[0][e] for e, x_D in zip(chosen, x_ND, strict=True)])
    np.testing.assert_array_equal(together, alone)


def test_a_missing_value_is_skipped_as_river_skips_an_absent_feature():
    theirs, ours = tree.HoeffdingTreeClassifier(grace_period=50), HoeffdingTrees(1, 3, 2)
    rng = np.random.default_rng(0)
    for x, x_D, y in numbered(sea_drift(1000, seed=3)):
        gone = int(rng.integers(6))  # half of the time none is
        x, x_D = {f: v for f, v in x.items() if f != gone}, np.where(np.arange(3) == gone, np.nan, x_D)
        proba_EC, judged = ours.judge(x_D, x)
        given = theirs.predict_proba_one(x)
        if given:
            np.testing.assert_allclose(proba_EC[0], [given.get(c, 0.0) for c in (0, 1)], atol=1e-9)
        ours.teach(x_D, x, [0], [y], judged)
        theirs.learn_one(x, y)
    assert ours.num_leaves == [theirs.n_leaves]
    assert theirs.n_leaves > 1


def test_growing_changes_no_prediction_for_what_was_there():
    trees = HoeffdingTrees(2, 3, 2)
    rows = numbered(sea_drift(200, seed=0))
    for x, x_D, y in rows:
        trees.teach(x_D, x, [0], [y], trees.judge(x_D, x)[1])
    before = trees.judge(rows[0][1], None)[0]
    trees.grow(4, 3)
    after = trees.judge(np.append(rows[0][1], np.nan), None)[0]
    np.testing.assert_allclose(after[0], [*before[0], 0.0], atol=1e-12)
    np.testing.assert_allclose(after[1], [1 / 3] * 3)


def test_a_tree_stops_at_its_largest_number_of_leaves():
    free, bounded = HoeffdingTrees(1, 9, 2), HoeffdingTrees(1, 9, 2, max_leaves=2)
    for x, x_D, y in numbered(agrawal()):
        for trees in (free, bounded):
            trees.teach(x_D, x, [0], [y], trees.judge(x_D, x)[1])
    assert bounded.num_leaves == [2]
    assert free.num_leaves[0] > 2
