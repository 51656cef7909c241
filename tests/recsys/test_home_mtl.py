import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone

from coterie.data import Vocabulary
from coterie.recsys.home_mtl import MultiTaskMoEClassifier
from coterie.recsys.metrics import auc

TASKS = {"click": "watch", "like": "social"}


def log(rows=600, seed=0):
    """Clicks depend on x and the user, likes on the item; a like is known only after a click."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "user": rng.integers(0, 20, rows),
            "item": rng.choice(["a", "b", "c", "d"], rows),
            "x": rng.normal(size=rows),
            "device": rng.choice(["tv", "phone"], rows),
        }
    )
    click = (frame["x"] + (frame["user"] % 2 * 2 - 1) > 0).astype(float)
    like = frame["item"].isin(["a", "b"]).astype(float).where(click == 1)
    return frame, pd.DataFrame({"click": click, "like": like})


def ranker(**options):
    options = {"categories": TASKS, "ids": ["user", "item"], "epochs": 10, "batch_size": 100} | options
    return MultiTaskMoEClassifier(hidden=8, lr=1e-2, **options)


@pytest.fixture(scope="module")
def fitted():
    return ranker().fit(*log())


def test_it_learns_both_tasks_from_rows_of_which_some_have_no_label(fitted):
    frame, labels = log(seed=1)
    probability = fitted.predict_proba(frame)
    assert auc(labels["click"], probability[:, 0]) > 0.95
    assert auc(labels["like"], probability[:, 1]) > 0.95
    assert fitted.loss_curve_[-1] < fitted.loss_curve_[0]
    np.testing.assert_array_equal(fitted.predict(frame), probability > 0.5)


def test_a_saved_ranker_predicts_the_same_bit_for_bit(fitted, tmp_path):
    frame, _ = log(seed=2)
    fitted.save(tmp_path / "ranker")
    again = MultiTaskMoEClassifier.load(tmp_path / "ranker")
    np.testing.assert_array_equal(again.predict_proba(frame), fitted.predict_proba(frame))
    assert again.get_params() == {**fitted.get_params(), "layout": {}}
    assert again.expert_usage_["click"].tolist() == fitted.expert_usage_["click"].tolist()
    assert "pickle" not in json.dumps(sorted(path.name for path in (tmp_path / "ranker").iterdir()))
    again.save(tmp_path / "ranker")  # over itself


def test_the_same_seed_gives_the_same_ranker_and_leaves_torchs_generator_alone(fitted):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = clone(ranker()).fit(*log())
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(again.predict_proba(log()[0]), fitted.predict_proba(log()[0]))


def test_unseen_and_missing_identifiers_are_predicted_like_rare_ones(fitted):
    frame, _ = log(8, seed=3)
    unseen, missing = frame.assign(user=999), frame.assign(user=np.nan)
    np.testing.assert_array_equal(fitted.predict_proba(unseen), fitted.predict_proba(missing))
    assert np.isfinite(fitted.predict_proba(frame.assign(x=np.nan))).all()


def test_rows_do_not_depend_on_their_neighbours_or_the_index(fitted):
    frame, _ = log(9, seed=4)
    alone = [fitted.predict_proba(frame.iloc[[i]])[0] for i in range(9)]
    np.testing.assert_allclose(fitted.predict_proba(frame), alone, rtol=1e-4)
    np.testing.assert_allclose(
        fitted.predict_proba(frame[::-1].set_axis(["row"] * 9))[::-1], alone, rtol=1e-4
    )


def test_a_gates_usage_sums_to_one_over_the_experts_it_reaches(fitted):
    usage = pd.DataFrame(fitted.expert_usage_, index=fitted.expert_names_)
    np.testing.assert_allclose(usage.sum(), 1, rtol=1e-5)
    assert (usage.loc[["category social 1", "like 1"], "click"] == 0).all()
    health = fitted.expert_health(log()[0])
    assert list(health["level"]) == [1] * 6 + [2] * 5
    assert health["zero_fraction"].max() < 0.05
    last = health[health["level"] == 2].set_index("expert")
    assert last.loc["click 1", "share_click"] == pytest.approx(1)
    assert last.loc["click 1", "monopolised_by"] == ""  # its own, by design
    assert last.loc["all 1", ["share_click", "share_like"]].sum() == pytest.approx(1)


def test_relu_experts_show_the_collapse_that_normalised_ones_do_not():
    sick = ranker(preset="mmoe", layout={"experts": 4}).fit(*log()).expert_health(log()[0])
    assert sick["zero_fraction"].max() > 0.2


def test_arrays_will_do():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    y = (x[:, :2] > 0).astype(int)
    mtl = MultiTaskMoEClassifier("mmoe", epochs=1).fit(x, y)
    assert mtl.predict_proba(x).shape == (40, 2)
    assert mtl.tasks_ == ["0", "1"]


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"categories": None}, {}, "home needs a category"),
        ({"categories": {"click": "watch"}}, {}, "exactly one category"),
        ({"ids": ["nobody"]}, {}, "no column 'nobody'"),
        ({}, {"click": 2.0}, "'click', row 0: 2.0; should be 0, 1"),
        ({}, {"click": "yes"}, "'click', row 0: 'yes'"),
        ({}, "short", "599 rows"),
        ({"batch_size": 0}, {}, "batch_size=0; should be at least 1"),
    ],
)
def test_what_is_wrong_is_named(options, change, message):
    frame, labels = log()
    labels = labels.iloc[1:] if change == "short" else labels.assign(**change)
    with pytest.raises(ValueError, match=message):
        ranker(**options).fit(frame, labels)


def test_a_task_with_one_class_warns_and_fits():
    frame, labels = log(50)
    with pytest.warns(UserWarning, match="'like' are alike"):
        ranker(epochs=1).fit(frame, labels.assign(like=1.0))


def test_a_vocabulary_knows_a_number_by_its_value_and_rare_ones_as_unseen():
    vocabulary = Vocabulary(min_count=2).fit(pd.Series([3, 3, 12, 12, 5]))
    assert vocabulary.encode(pd.Series([3.0, np.nan, 12, 5])).tolist() == [2, 0, 1, 0]
    assert vocabulary.encode(pd.Series(["3", None, "x"])).tolist() == [2, 0, 0]
    assert len(vocabulary) == 3
