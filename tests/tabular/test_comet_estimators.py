import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import make_classification, make_friedman1
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator

from coterie.tabular import COMETClassifier, COMETRegressor


@pytest.mark.parametrize("estimator", [COMETClassifier(epochs=40), COMETRegressor(epochs=40)])
def test_every_check_of_scikit_learn_passes(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, on_fail=None, on_skip=None)
    assert {r["check_name"]: str(r["exception"]) for r in results if r["status"] == "failed"} == {}
    assert sum(r["status"] == "passed" for r in results) > 40


def test_regions_with_functions_of_their_own_are_found():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(3000, 4))
    y = np.where(x[:, 0] > 0, 3 * x[:, 1], -3 * x[:, 1])  # no linear function explains any of it
    model = COMETRegressor(num_experts=4, random_state=0, epochs=40).fit(x[:2500], y[:2500])
    assert model.score(x[2500:], y[2500:]) > 0.9
    assert model.experts_per_row_ < 4


def test_a_stronger_entropy_loss_uses_fewer_experts():
    x, y = make_friedman1(1500, random_state=0)
    weak, strong = (
        COMETRegressor(entropy=entropy, early_stopping=False, epochs=25, random_state=0).fit(x, y)
        for entropy in (0.0, 0.3)
    )
    assert strong.experts_per_row_ < weak.experts_per_row_ - 0.5


@pytest.mark.parametrize("search", [False, True])
def test_what_is_saved_predicts_the_same_bits(tmp_path, search):
    x, y = make_classification(300, 6, random_state=0)
    labels = np.array(["no", "yes"])[y]
    model = COMETClassifier(epochs=11, local_search=search, random_state=0).fit(x, labels)
    again = COMETClassifier.load(model.save(tmp_path / "model"))
    assert np.array_equal(again.predict_proba(x), model.predict_proba(x))
    assert np.array_equal(again.predict(x), model.predict(x))
    assert again.get_params() == model.get_params()
    assert np.array_equal(again.experts_of(x), model.experts_of(x))
    with pytest.raises(ValueError, match="holds a COMETClassifier; COMETRegressor cannot read it"):
        COMETRegressor.load(tmp_path / "model")


def test_gate_weights_of_a_row_sum_to_one_and_usage_is_their_mean():
    x, y = make_friedman1(300, random_state=0)
    model = COMETRegressor(epochs=5, random_state=0).fit(x, y)
    weights = model.experts_of(x)
    assert np.allclose(weights.sum(1), 1, atol=1e-5)
    assert np.allclose(weights.mean(0), model.expert_usage_, atol=1e-6)


def test_the_same_random_state_gives_the_same_model_and_leaves_torch_alone():
    x, y = make_friedman1(200, random_state=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (COMETRegressor(epochs=3, random_state=7).fit(x, y).predict(x) for _ in range(2))
    assert np.array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not np.array_equal(first, COMETRegressor(epochs=3, random_state=8).fit(x, y).predict(x))


def mixed_frame(rows: int = 400) -> tuple[pd.DataFrame, pd.Series]:
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"size": generator.normal(size=rows), "place": generator.choice(["a", "b", "c"], rows)}
    )
    target = frame["size"] * frame["place"].map({"a": 1.0, "b": -1.0, "c": 0.0})
    frame.loc[::10, "size"] = np.nan
    return frame, target


def test_frames_with_texts_and_gaps_are_taken_and_unseen_categories_too(tmp_path):
    frame, target = mixed_frame()
    model = COMETRegressor(epochs=40, random_state=0).fit(frame, target)
    assert model.score(frame, target) > 0.7
    unseen = frame.assign(place="never seen")
    assert np.isfinite(model.predict(unseen)).all()
    again = COMETRegressor.load(model.save(tmp_path / "m"))
    assert np.array_equal(again.predict(frame), model.predict(frame))
    assert np.array_equal(again.predict(frame[["place", "size"]]), model.predict(frame))  # by name, not place
    with pytest.raises(ValueError, match="no column 'size'"):
        model.predict(frame[["place"]])
    with pytest.raises(ValueError, match=r"column 'size', row 1: 'big' where a number should be"):
        model.predict(frame.astype({"size": object}).assign(size=[1.0, "big"] * 200))


def test_arrays_are_frames_whose_columns_have_no_names(tmp_path):
    x, y = make_friedman1(200, random_state=0)
    x[::9, 1] = np.nan
    model = COMETRegressor(epochs=5, random_state=0).fit(x, y)
    named = pd.DataFrame(x, columns=list("abcdefghij"))
    same = COMETRegressor(epochs=5, random_state=0).fit(named, y)
    assert np.array_equal(same.predict(named), model.predict(x))
    loaded = COMETRegressor.load(model.save(tmp_path / "m"))
    assert np.array_equal(loaded.predict(x), model.predict(x))
    with warnings.catch_warnings():  # scikit-learn's, of names that come or go
        warnings.simplefilter("ignore")
        assert np.array_equal(same.predict(x), model.predict(x))
        assert np.array_equal(model.predict(named), model.predict(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 9}, "k=9"),
        ({"num_experts": 1}, "num_experts=1"),
        ({"gamma": 0.0}, "gamma"),
        ({"epochs": 0}, "epochs=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": 1e9}, "smaller lr"),
        ({"entropy": -0.1}, "entropy=-0.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    x, y = make_friedman1(60, random_state=0)
    with pytest.raises(ValueError, match=message):
        COMETRegressor(**settings).fit(x, y)


def test_an_unfitted_estimator_is_not_saved(tmp_path: Path):
    with pytest.raises(NotFittedError):
        COMETRegressor().save(tmp_path / "m")
    assert not list(tmp_path.iterdir())
