import numpy as np
import pandas as pd
import pytest
import torch
from river import checks, tree
from river.naive_bayes import GaussianNB

from coterie.data import led_drift, sea_drift
from coterie.stream import DriftMoEClassifier, OnlineRouter, prequential
from coterie.stream.columns import StreamColumns

SMALL = {"n_experts": 4, "top_k": 2, "hidden": (16, 8), "router_batch": 8, "seed": 0}


def model(**options):
    return DriftMoEClassifier(**SMALL | options)


def predictions(classifier, stream):
    found = []
    for x, y in stream:
        found.append(classifier.predict_one(x))
        classifier.learn_one(x, y)
    return found


def frame_of(stream):
    rows = list(stream)
    return pd.DataFrame([{f"f{name}": value for name, value in x.items()} for x, _ in rows]), [
        y for _, y in rows
    ]


@pytest.mark.parametrize("mode", ["data", "task"])
def test_it_keeps_every_convention_of_river(mode):
    classifier = model(mode=mode, n_experts=2, top_k=1, seed=None)
    assert classifier._unit_test_skips() == set()  # none of the checks is left out
    checks.check_estimator(classifier)


@pytest.mark.parametrize("stream", [lambda: sea_drift(500, seed=1), lambda: led_drift(150, seed=1)])
@pytest.mark.parametrize("mode", ["data", "task"])
def test_trees_in_arrays_give_the_predictions_of_rivers_trees(stream, mode):
    rows = list(stream())
    classes = tuple(sorted({y for _, y in rows}))
    rivers = tree.HoeffdingTreeClassifier(grace_period=50, delta=1e-7)
    ours = model(mode=mode, task_predict="product", classes=classes)
    theirs = model(mode=mode, task_predict="product", classes=classes, expert=rivers)
    assert predictions(ours, rows) == predictions(theirs, rows)


def test_if_all_experts_learn_they_are_the_single_tree():
    rows = list(sea_drift(500, seed=0))
    single = tree.HoeffdingTreeClassifier(grace_period=50, delta=1e-7)
    pool = predictions(model(top_k=4), rows)
    assert sum(a != b for a, b in zip(pool, predictions(single, rows), strict=True)) <= 1


class Oracle(OnlineRouter):
    """Ranks the experts in their order, and keeps what it is taught."""

    taught: list

    def logits(self, x):
        return -np.arange(self.num_experts, dtype=np.float32)

    def learn(self, x_D, target_E):
        self.taught.append(np.array(target_E, dtype=int).tolist())
        return False


def with_oracle(**options):
    class Classifier(DriftMoEClassifier):
        def _new_router(self, features, experts):
            router = Oracle(features, experts, (2,), lr=1.0, batch=8, rng=self._rng)
            router.taught = []
            return router

    return Classifier(**SMALL | options)


def test_only_the_top_k_learn_and_the_first_answers():
    classifier = with_oracle(expert=GaussianNB())
    for i in range(10):
        classifier.learn_one({"a": float(i)}, i % 2)
    learnt = [bool(each.predict_proba_one({"a": 1.0})) for each in classifier.experts_.models]
    assert learnt == [True, True, False, False]
    assert classifier.usage_.tolist() == [1, 0, 0, 0]
    first = classifier.experts_.models[0].predict_proba_one({"a": 3.0})
    assert classifier.predict_proba_one({"a": 3.0}) == pytest.approx(first)


def test_the_mask_is_made_before_any_expert_learns_and_has_every_right_expert():
    classifier = with_oracle(classes=(0, 1))
    for y in (1, 1, 0):
        classifier.learn_one({"a": 1.0}, y)
    # untaught trees are undecided and say the first class, so that none is right about a first 1: the least
    # wrong of four alike is the first. Then the two taught ones say 1, and about 0 the untaught are right.
    assert classifier.router_.taught == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    assert classifier.expert_accuracy_.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 3])


def test_the_best_mask_has_one_expert():
    classifier = with_oracle(classes=(0, 1), mask="best")
    for y in (1, 1, 0):
        classifier.learn_one({"a": 1.0}, y)
    assert classifier.router_.taught == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]


def test_in_task_mode_the_target_is_the_label_and_every_tree_learns():
    classifier = with_oracle(mode="task", classes=("a", "b", "c"))
    for y in "abca":
        classifier.learn_one({"x": 1.0}, y)
    assert classifier.router_.taught == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    proba_EC = classifier.experts_.judge(np.array([1.0]), None)[0]
    np.testing.assert_allclose(proba_EC[:, 1], [0.5, 0.25, 0.25])


def test_predicting_a_product_consults_the_trees():
    rows = list(sea_drift(200, seed=0))
    router = with_oracle(mode="task", classes=(True, False))
    product = with_oracle(mode="task", classes=(True, False), task_predict="product")
    assert set(predictions(router, rows)) == {True}  # the oracle's first class
    assert set(predictions(product, rows)) == {True, False}


def test_predicting_in_between_changes_nothing():
    rows = list(sea_drift(100, seed=0))
    often, never = model(), model()
    for x, y in rows:
        for other, _ in rows[:3]:
            often.predict_one(other)
        often.predict_one(x)
        often.learn_one(x, y)
        never.learn_one(x, y)
    assert [often.predict_proba_one(x) for x, _ in rows] == [never.predict_proba_one(x) for x, _ in rows]


def test_tables_are_learnt_and_predicted_as_their_rows_one_by_one():
    X, y = frame_of(sea_drift(150, seed=0))
    whole, single = model(), model(classes=(False, True))
    whole.partial_fit(X[:300], y[:300], classes=[False, True]).partial_fit(X[300:], y[300:])
    for row, label in zip(X.to_dict("records"), y, strict=True):
        single.learn_one(row, label)
    one_by_one = [single.predict_proba_one(row) for row in X.to_dict("records")]
    expected = [[proba[False], proba[True]] for proba in one_by_one]
    np.testing.assert_allclose(whole.predict_proba(X), expected, atol=1e-12)
    assert whole.predict(X).tolist() == [max(proba, key=proba.get) for proba in one_by_one]
    array = model().partial_fit(X.to_numpy(), y, classes=[False, True])
    np.testing.assert_array_equal(array.predict(X.to_numpy()), whole.predict(X))


def test_the_same_seed_gives_the_same_and_torchs_generator_is_left_alone():
    rows = list(led_drift(60, seed=0))
    state = torch.get_rng_state()
    assert predictions(model(), rows) == predictions(model(), rows)
    assert predictions(model(), rows) != predictions(model(seed=1), rows)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "options", [{}, {"mode": "task"}, {"dropout": 0.2}, {"expert": tree.HoeffdingTreeClassifier()}]
)
def test_a_saved_model_goes_on_as_if_there_had_been_no_break(tmp_path, options):
    rows = [({**x, "day": "Mon" if x[0] > 5 else "Tue"}, y) for x, y in sea_drift(75, seed=0)]
    unbroken = model(**options)
    predictions(unbroken, rows[:150])
    unbroken.save(tmp_path / "model")
    loaded = DriftMoEClassifier.load(tmp_path / "model", trusted="expert" in options)
    assert predictions(loaded, rows[150:]) == predictions(unbroken, rows[150:])
    assert loaded.usage_.tolist() == unbroken.usage_.tolist()
    assert loaded.predict_proba_one(rows[0][0]) == unbroken.predict_proba_one(rows[0][0])


def test_a_pickle_is_refused_unless_trusted(tmp_path):
    classifier = model(expert=GaussianNB())
    predictions(classifier, sea_drift(5))
    classifier.save(tmp_path)
    with pytest.raises(ValueError, match="trusted=True"):
        DriftMoEClassifier.load(tmp_path)


def test_features_and_classes_may_come_later():
    classifier = model(mode="task")
    classifier.learn_one({"a": 1.0}, "x")
    classifier.learn_one({"a": 1.0, "b": "red"}, "y")
    classifier.learn_one({"b": "blue", "c": 2.0}, "z")
    proba = classifier.predict_proba_one({"a": 1.0, "b": "green"})
    assert list(proba) == ["x", "y", "z"]
    assert sum(proba.values()) == pytest.approx(1)


def test_before_anything_is_learnt_probabilities_are_uniform():
    assert model().predict_one({"a": 1.0}) is None
    assert model().predict_proba_one({"a": 1.0}) == {}
    assert model(classes=("x", "y")).predict_proba_one({"a": 1.0}) == {"x": 0.5, "y": 0.5}
    with pytest.raises(ValueError, match="no label is known"):
        model().predict([[1.0]])


def test_rare_classes_are_warned_of_in_task_mode():
    classifier = model(mode="task", router_batch=64)
    labels = ["rare" if i % 100 == 0 else "common" for i in range(1000)]
    with pytest.warns(UserWarning, match="class 'rare' has 1.0% of the rows"):
        classifier.partial_fit([[float(i % 7)] for i in range(1000)], labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k=5 of 4 experts"),
        ({"n_experts": 0}, "n_experts=0"),
        ({"classes": ("a",)}, "at least two"),
        ({"mode": "tasks"}, "use one of data, task"),
        ({"mask": "all"}, "use one of multi_hot, best"),
        ({"router_batch": 0}, "router_batch=0"),
        ({"delta": 0.0}, "0 < delta < 1"),
        ({"hidden": ()}, "at least one layer"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_a_label_outside_the_classes_is_refused_or_grown():
    with pytest.raises(ValueError, match="row 0: label 'z' is none of 'x', 'y'; use grow_classes=True"):
        model(classes=("x", "y")).learn_one({"a": 1.0}, "z")
    grown = model(classes=("x", "y"), grow_classes=True)
    grown.learn_one({"a": 1.0}, "z")
    assert grown.classes_ == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({"a": float("nan")}, "row 1: feature 'a' is nan"),
        ({"a": float("inf")}, "row 1: feature 'a' is inf; should be a finite number"),
        ({"a": "red"}, "row 1: feature 'a' is 'red'; it was a number before"),
    ],
)
def test_a_bad_row_is_named_and_leaves_no_trace(x, message):
    classifier = model()
    classifier.learn_one({"a": 1.0}, 0)
    with pytest.raises(ValueError, match=message):
        classifier.learn_one(x, 1)
    assert (classifier.classes_, classifier.rows_seen_) == ([0], 1)


def test_an_imputed_nan_is_an_absent_feature():
    absent, imputed = model(impute=True), model(impute=True)
    for classifier, hole in ((absent, {}), (imputed, {"b": float("nan")})):
        for i in range(40):
            x = {"a": float(i % 5), "b": float(i % 3)}
            classifier.learn_one({"a": x["a"], **hole} if i % 4 == 3 else x, i % 2)
    assert absent.predict_proba_one({"a": 1.0}) == imputed.predict_proba_one({"a": 1.0, "b": float("nan")})


def test_a_whole_number_is_one_category_however_it_is_written():
    columns = StreamColumns()
    columns.learn({"zip": "7"}, row=0)
    for value in (7, 7.0, np.float32(7), "7"):
        assert columns.vector({"zip": value}, row=1).tolist() == [1.0]


def test_a_table_with_other_features_is_refused():
    classifier = model().partial_fit([[1.0, 2.0]], [0])
    with pytest.raises(ValueError, match=r"row 1: 3 features .* 2 before"):
        classifier.partial_fit([[1.0, 2.0, 3.0]], [1])
    with pytest.raises(ValueError, match="2 rows and 1 labels"):
        classifier.partial_fit([[1.0, 2.0], [1.0, 2.0]], [1])
    with pytest.raises(ValueError, match="label is missing"):
        classifier.learn_one({0: 1.0, 1: 2.0}, float("nan"))


def test_electricity_is_predicted_better_than_by_its_majority(data_dir):
    from itertools import islice

    from coterie.data import read_stream

    stream = islice(read_stream(data_dir / "stream" / "elec.csv", "class"), 3000)
    assert prequential(model(), stream)["kappa_m"].iloc[-1] > 0.3
