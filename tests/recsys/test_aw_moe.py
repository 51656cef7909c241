import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone

from coterie.data import read_table
from coterie.recsys.aw_moe import AWMoE, ranking_loss
from coterie.recsys.aw_moe_ranker import AWMoERanker
from coterie.recsys.metrics import auc


def log(users=40, rows=24, seed=0):
    """Half of the users like even items, half odd ones: only the history says which."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rows)
    item = np.concatenate([rng.permutation(30)[:rows] for _ in range(users)])
    return pd.DataFrame(
        {
            "user_id": user,
            "item_id": item,
            "timestamp": np.tile(np.arange(rows), users) * 10 + user % 7,
            "rating": np.where((item + user) % 2 == 0, 5, 2),
        }
    )


def ranker(**options):
    return AWMoERanker(**({"epochs": 15, "lr": 1e-2, "batch_size": 128, "history": 8} | options))


@pytest.fixture(scope="module")
def fitted():
    return ranker().fit(log())


def test_it_ranks_new_users_by_what_they_liked(fitted):
    new = log(seed=1).assign(user_id=lambda frame: frame["user_id"] + 1000)
    late = new[new["timestamp"] > 100]
    score = fitted.predict_proba(late, since=new)
    assert auc(late["rating"] >= 4, score) > 0.85
    items, scores = fitted.rank([0, 2, 4, 6], candidates=[11, 12, 13, 14])
    assert {*items[:2]} == {12, 14}
    assert bool((np.diff(scores) <= 0).all())
    assert {*fitted.rank([1, 3, 5, 7], candidates=[11, 12, 13, 14])[0][:2]} == {11, 13}


def test_no_prediction_depends_on_what_is_logged_at_its_time_or_later(fitted):
    rows = log(4, seed=2).assign(user_id=lambda frame: frame["user_id"] + 1000)
    now = rows[rows["timestamp"] <= 100]
    later = rows["timestamp"] >= now["timestamp"].max()
    shuffled = rows.copy()
    shuffled.loc[later, "item_id"] = rows.loc[later, "item_id"].to_numpy()[::-1]
    shuffled.loc[later, "rating"] = 7 - rows.loc[later, "rating"]
    np.testing.assert_array_equal(
        fitted.predict_proba(now, since=rows), fitted.predict_proba(now, since=shuffled)
    )
    assert not np.array_equal(fitted.predict_proba(now, since=rows), fitted.predict_proba(now))


def test_rows_that_were_fitted_on_do_not_count_twice(fitted):
    history, _ = fitted.encode(log())
    again, _ = fitted.encode(log(), since=log())
    assert torch.equal(again, history)


def test_a_saved_ranker_predicts_the_same_bit_for_bit(fitted, tmp_path):
    fitted.save(tmp_path / "ranker")
    again = AWMoERanker.load(tmp_path / "ranker")
    rows = log(seed=3)
    np.testing.assert_array_equal(again.predict_proba(rows), fitted.predict_proba(rows))
    np.testing.assert_array_equal(again.gate_weights(rows), fitted.gate_weights(rows))
    assert again.get_params() == fitted.get_params()
    again.save(tmp_path / "ranker")


def test_the_same_seed_gives_the_same_ranker_and_leaves_torchs_generator_alone():
    before = torch.random.get_rng_state()
    options = {"epochs": 1, "contrastive": 0.1}
    one, other = (clone(ranker(**options)).fit(log()) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(one.predict_proba(log()), other.predict_proba(log()))


def test_users_and_items_may_be_numbers_or_the_same_numbers_as_texts(fitted):
    rows = log(5)
    texts = rows.astype({"user_id": str, "item_id": str})
    np.testing.assert_array_equal(fitted.predict_proba(texts), fitted.predict_proba(rows))
    assert np.isfinite(fitted.predict_proba(rows.assign(user_id="new", item_id="new"))).all()


def test_item_features_reach_items_that_have_no_embedding():
    items = pd.DataFrame({"item_id": range(30), "odd": [str(n % 2) for n in range(30)]})
    by_features = ranker(embedding=0).fit(log(), items)
    late = log()[log()["timestamp"] > 100]
    assert auc(late["rating"] >= 4, by_features.predict_proba(late)) > 0.95
    with pytest.raises(ValueError, match="item 3 is in items twice"):
        ranker().fit(log(), items.assign(item_id=items["item_id"].replace(4, 3)))


def test_usage_sums_to_one_and_a_gate_may_be_negative(fitted):
    assert fitted.expert_usage_.sum() == pytest.approx(1)
    assert fitted.gate_weights(log()).shape == (960, 4)
    assert fitted.gate_weights(log()).min() < 0


@pytest.mark.parametrize(("gate", "experts"), [("softmax", 4), ("one expert", 1)])
def test_the_baselines_are_the_same_ranker_with_another_gate(gate, experts):
    baseline = ranker(gate=gate, epochs=1).fit(log())
    weights = baseline.gate_weights(log())
    assert weights.shape == (960, experts)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="use gate='attention'"):
        ranker(gate=gate, contrastive=0.1).fit(log())


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"rating": 1}, {}, "all 960 outcomes are not positive"),
        ({"rating": "good"}, {}, "'rating', row 0: 'good'"),
        ({"timestamp": np.nan}, {}, "'timestamp', row 0: nan"),
        ({}, {"item": "film"}, "no column 'film'"),
        ({}, {"contrastive": 0.1, "mask_prob": 1.0}, "0 ≤ p < 1"),
        ({}, {"history": 0}, "at least 1 item"),
        ({}, {"epochs": 0}, "epochs=0; should be at least 1"),
        ({}, {"lr": 0.0}, "lr=0.0; should be above 0"),
    ],
)
def test_what_is_wrong_is_named(change, options, message):
    with pytest.raises(ValueError, match=message):
        ranker(**options).fit(log().assign(**change))


def test_the_contrastive_loss_reaches_the_gate_and_numbers_of_no_item_are_refused():
    model = AWMoE(torch.randn(9, 2))
    history, target = torch.tensor([[1, 2, 3], [0, 4, 5]]), torch.tensor([6, 7])
    label, user = torch.tensor([0.0, 1.0]), torch.tensor([0, 1])
    generator = torch.Generator().manual_seed(0)
    plain = ranking_loss(model, history, target, label, user)
    with_it = ranking_loss(model, history, target, label, user, contrastive=0.5, generator=generator)
    assert with_it > plain
    with pytest.raises(IndexError, match="items run from 0 to 9; there are 9"):
        model(history, torch.tensor([6, 9]))


def test_the_logit_is_the_signed_sum_of_the_experts_scores():
    model = AWMoE(torch.randn(9, 2)).double()
    seen = {}
    model.score.register_forward_hook(lambda module, inputs, output: seen.update(scores=output))
    output = model(torch.tensor([[1, 2, 3]]), torch.tensor([6]))
    torch.testing.assert_close(output.logits, (output.gate * seen["scores"]).sum(1))


def test_movielens_is_ranked_better_than_by_chance(data_dir):
    frame = read_table(data_dir / "recsys" / "ml-100k.inter").sort_values("timestamp", kind="stable")
    train, test = frame[50_000:80_000], frame[80_000:85_000]
    fitted = AWMoERanker(epochs=1, lr=1e-2).fit(train)
    assert auc(test["rating"] >= 4, fitted.predict_proba(test, since=test)) > 0.6
