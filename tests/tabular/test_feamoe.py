import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_estimator

from coterie.tabular import FEAMOEClassifier, demographic_parity_gap, equalized_odds_gap
from coterie.tabular.attribution import enumerated_shapley


def table(rows=400, seed=0, shift=0.0):
    """What debt does turns round with the sign of `regime`; `shift` lowers the income of group "y"."""
    rng = np.random.default_rng(seed)
    X = pd.DataFrame(rng.standard_normal((rows, 3)), columns=["income", "debt", "regime"])
    X["job"] = rng.choice(["baker", "smith"], rows)
    group = rng.choice(["x", "y"], rows, p=[0.6, 0.4])
    X["income"] -= shift * (group == "y")
    score = X["income"] + 2 * X["debt"] * np.where(X["regime"] > 0, 1, -1)
    return X, (rng.random(rows) < 1 / (1 + np.exp(-2 * score))).astype(int).to_numpy(), group


def model(**options):
    return FEAMOEClassifier(**{"n_iter": 60, "random_state": 0, **options})


def stream(shift):
    """Four chunks; from the third on there is drift."""
    return [table(500, seed, shift if seed >= 2 else 0.0) for seed in range(4)]


def learnt(chunks, **options):
    made = model(**options)
    for X, y, group in chunks:
        made.partial_fit(X, y, group)
    return made


def test_it_passes_scikit_learns_checks():
    """All, with fairness=None: where a gap is watched, groups must be given, and the checks give none."""
    results = check_estimator(model(fairness=None, n_iter=30), on_fail=None, on_skip=None)
    assert [r["check_name"] for r in results if r["status"] == "failed"] == []
    assert len(results) > 40


def test_experts_learn_what_one_linear_model_cannot():
    X, y, group = table(1500)
    many, one = (
        model(n_experts=n, lam=0.0, n_iter=150).fit(X[:1000], y[:1000], group[:1000]) for n in (2, 1)
    )
    assert many.score(X[1000:], y[1000:]) > one.score(X[1000:], y[1000:]) + 0.15


def test_one_expert_is_logistic_regression():
    X, y, group = table()
    made = model(n_experts=1, max_experts=1, lam=0.0, l2=0.0, n_iter=600).fit(X, y, group)
    reference = LogisticRegression(C=1e6).fit(made.encode(X), y)
    assert made.predict_proba(X) == pytest.approx(reference.predict_proba(made.encode(X)), abs=1e-3)


@pytest.mark.parametrize("group_gap", ["range", "variance"])
@pytest.mark.parametrize(("fairness", "names"), [("dp", "xy"), ("eo", "xy"), ("dp", "xyz")])
def test_the_penalty_narrows_its_gap(fairness, names, group_gap):
    X, y, group = table(900, shift=1.5)
    group = np.where((np.arange(900) % 3 == 0) & (len(names) == 3), "z", group)
    lam = {"range": 1.0, "variance": 10.0}[group_gap]

    def gap(lam):
        yhat = model(fairness=fairness, group_gap=group_gap, lam=lam).fit(X, y, group).predict(X)
        return demographic_parity_gap(yhat, group) if fairness == "dp" else equalized_odds_gap(y, yhat, group)

    assert gap(lam) < 0.7 * gap(0.0)


def test_burden_asks_which_class_is_wanted():
    X, y, group = table(900, shift=1.5)
    wanted = [model(fairness="burden", favourable=f, lam=0.0).fit(X, y, group) for f in (0, 1)]
    one, zero = (made.recourse_distance(X) for made in reversed(wanted))
    assert (one[zero > 0] == 0).all()  # who is some way from one class is beyond the other
    assert (one + zero > 0).all()
    assert wanted[0].history_[0]["gap_after"] != wanted[1].history_[0]["gap_after"]


def test_distance_moves_a_row_just_to_the_boundary_of_its_held_gate():
    X, y, group = table()
    made = model(lam=0.0).fit(X, y, group)
    gate, distance = made.gate_weights(X), made.recourse_distance(X)
    weight = gate @ made.coef_
    moved = made.encode(X) + distance[:, None] * weight / np.linalg.norm(weight, axis=1, keepdims=True)
    score = (gate * (moved @ made.coef_.T + made.intercept_)).sum(1)
    assert score[distance > 0] == pytest.approx(0, abs=1e-9)
    assert (score[distance == 0] >= 0).all()


def test_fairness_drift_adds_an_expert_and_a_steady_stream_does_not():
    steady = learnt(stream(0.0), eps_acc=0.1, eps_fair=0.15)
    drifting = learnt(stream(2.0), eps_acc=np.inf, eps_fair=0.15)
    assert [entry["experts"] for entry in steady.history_] == [2, 2, 2, 2]
    assert [entry["grown"] for entry in drifting.history_][:3] == [False, False, True]
    assert drifting.history_[2]["fairness_drift"]
    assert not drifting.history_[2]["accuracy_drift"]


def test_chunks_are_scored_before_they_are_learnt_from():
    chunks = stream(2.0)
    made = learnt(chunks[:2])
    X, y, group = chunks[2]
    accuracy, gap = made.score(X, y), demographic_parity_gap(made.predict(X), group)
    made.partial_fit(X, y, group)
    assert made.history_[2]["accuracy"] == pytest.approx(accuracy)
    assert made.history_[2]["gap"] == pytest.approx(gap)


def test_what_drift_is_measured_against_stays_until_the_mixture_grows():
    chunks = [
        table(500, seed, 0.4 * seed) for seed in range(5)
    ]  # too slow to show from one chunk to the next
    made = learnt(chunks, lam=0.0, eps_acc=np.inf, eps_fair=0.2)
    gaps = [entry["gap"] for entry in made.history_[1:]]
    grown = [entry["grown"] for entry in made.history_]
    first = grown.index(True)
    assert made.history_[first]["gap"] > made.history_[0]["gap_after"] + 0.2
    assert gaps[first - 1] - gaps[first - 2] < 0.2


def test_updates_on_drift_only_leave_the_model_as_it_is_without():
    chunks = stream(0.0)
    made = learnt(chunks[:1], update="on_drift", eps_acc=np.inf, eps_fair=np.inf)
    before = made.coef_
    made.partial_fit(*chunks[1])
    assert (made.coef_ == before).all()


def test_audited_experts_stay_bit_for_bit_when_only_the_new_one_is_fitted():
    chunks = stream(2.0)
    made = learnt(chunks[:2], refit="new", eps_acc=np.inf, eps_fair=0.15)
    before = made.coef_
    for chunk in chunks[2:]:
        made.partial_fit(*chunk)
    assert made.n_experts_ > 2
    assert (made.coef_[:2] == before).all()


def test_a_new_expert_can_start_from_the_errors():
    chunks = stream(2.0)
    options = {"eps_acc": np.inf, "eps_fair": 0.15, "n_iter": 20}
    errors, random = (learnt(chunks[:3], new_expert=kind, **options) for kind in ("errors", "random"))
    assert errors.n_experts_ == random.n_experts_ == 3
    assert not np.allclose(errors.coef_[2], random.coef_[2])


def test_fit_in_chunks_is_partial_fit_on_each():
    X, y, group = table(900)
    whole = model(chunk_size=300).fit(X, y, group)
    parts = learnt([(X[i : i + 300], y[i : i + 300], group[i : i + 300]) for i in (0, 300, 600)])
    assert (whole.predict_proba(X) == parts.predict_proba(X)).all()
    assert whole.background_ == pytest.approx(whole.encode(X).mean(0))


@pytest.mark.parametrize("mix", ["prob", "logit"])
def test_explanations_are_shapley_values_summed_over_the_features_of_a_column(mix):
    X, y, group = table(300)
    X.loc[3, "debt"] = np.nan
    made = model(mix=mix, n_experts=3, loss="localized").fit(X, y, group)
    assert made.features_ == ["income", "debt", "debt is missing", "regime", "job=baker", "job=smith"]
    some = X[:8]
    phi, phi0, per_expert = made.explain(some)
    gate, x = made.gate_weights(some), made.encode(some)
    blocks = [[0], [1, 2], [3], [4, 5]]
    coef, intercept = torch.from_numpy(made.coef_), torch.from_numpy(made.intercept_)
    for row in range(len(some)):
        exact = enumerated_shapley(
            lambda z, row=row: (z @ coef.T + intercept) @ torch.from_numpy(gate[row]),
            torch.from_numpy(x[row : row + 1]),
            torch.from_numpy(made.background_),
            blocks,
        )
        assert phi[row] == pytest.approx(exact[0].numpy(), abs=1e-9)
    score = (gate * (x @ made.coef_.T + made.intercept_)).sum(1)
    assert phi.sum(1) + phi0 == pytest.approx(score, abs=1e-9)
    assert per_expert.sum(1) == pytest.approx(phi, abs=1e-12)
    if mix == "logit":
        p = made.predict_proba(some)[:, 1]
        assert np.log(p / (1 - p)) == pytest.approx(score)
    single = made.explain(some, by="feature").phi
    assert single[:, 4] + single[:, 5] == pytest.approx(phi[:, 3])


def test_with_the_gate_other_columns_matter_and_the_sum_is_the_same():
    X, y, group = table(800)
    made = model(lam=0.0, n_iter=150).fit(X, y, group)
    held, moving = made.explain(X[:30]), made.explain(X[:30], include_gate=True, n_permutations=20)
    assert np.abs(moving.phi - held.phi).max() > 0.5
    assert moving.phi.sum(1) + moving.phi0 == pytest.approx(held.phi.sum(1) + held.phi0, abs=1e-9)
    again = made.explain(X[:30], include_gate=True, n_permutations=20)
    assert (again.phi == moving.phi).all()


def test_saved_and_loaded_it_predicts_explains_and_learns_on_the_same(tmp_path):
    chunks = stream(2.0)
    made = learnt(chunks[:3], favourable=1, eps_acc=np.inf)
    made.save(tmp_path / "saved")
    loaded = FEAMOEClassifier.load(tmp_path / "saved")
    for both in range(2):
        X, _, _ = chunks[3]
        assert (loaded.predict_proba(X) == made.predict_proba(X)).all()
        assert (loaded.explain(X).phi == made.explain(X).phi).all()
        assert loaded.history_ == made.history_
        assert loaded.get_params() == made.get_params()
        if not both:
            made.partial_fit(*chunks[3])
            loaded.partial_fit(*chunks[3])


def test_classes_of_any_kind_come_back_from_disk(tmp_path):
    X, y, group = table(100)
    for number, labels in enumerate(
        [np.array(["no", "yes"]), np.array(["no", "yes"], dtype=object), [False, True]]
    ):
        made = model(n_iter=2).fit(X, np.asarray(labels)[y], group)
        made.save(tmp_path / str(number))
        loaded = FEAMOEClassifier.load(tmp_path / str(number))
        assert loaded.predict(X).tolist() == made.predict(X).tolist()
        assert loaded.classes_.dtype == made.classes_.dtype


def test_it_is_deterministic_clones_and_leaves_torchs_generator_alone():
    X, y, group = table()
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    made = model().fit(X, y, group)
    assert torch.rand(2).tolist() == expected
    assert (clone(made).fit(X, y, group).predict_proba(X) == made.predict_proba(X)).all()


def test_a_grid_search_passes_the_groups_on():
    X, y, group = table(200)
    search = GridSearchCV(model(n_iter=5), {"lam": [0.0, 1.0]}, cv=2).fit(X, y, sensitive=group)
    assert search.best_params_["lam"] in (0.0, 1.0)


def test_usage_and_gate_are_shares():
    X, y, group = table()
    made = model().fit(X, y, group)
    assert made.expert_usage_ == pytest.approx(made.gate_weights(X).mean(0))
    assert made.gate_weights(X).sum(1) == pytest.approx(1)


def test_unseen_categories_count_as_none_and_unforeseen_gaps_are_said():
    X, y, group = table()
    made = model().fit(X, y, group)
    strange = X[:2].assign(job="pilot")
    assert made.encode(strange)[:, -2:].tolist() == [[0, 0], [0, 0]]
    with pytest.warns(UserWarning, match="column 'debt' misses values, and missed none"):
        assert made.encode(X[:1].assign(debt=np.nan))[0, 1] == 0


def test_a_small_group_is_left_out_and_said():
    X, y, group = table(300)
    group[:5] = "z"
    with pytest.warns(UserWarning, match=r"group 'z' \(5 rows\) has fewer than 20 rows"):
        made = model().fit(X, y, group)
    yhat, kept = made.predict(X), group != "z"
    assert made.history_[0]["gap_after"] == pytest.approx(demographic_parity_gap(yhat[kept], group[kept]))


def test_a_penalty_that_makes_all_decisions_alike_is_said():
    X, y, group = table(300, shift=3.0)
    y = np.where(np.arange(300) % 10 == 0, y, 1)
    with pytest.warns(UserWarning, match="of a chunk's decisions are positive: a gap closes also"):
        model(lam=50.0).fit(X, y, group)


X, Y, GROUP = table(60)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: model().fit(X, Y), "fairness='dp' needs sensitive=, the group of each row"),
        (lambda: model().fit(X, Y, ["x"] * 60), "sensitive holds one group, 'x'"),
        (lambda: model().fit(X, Y, [None, *GROUP[1:]]), "sensitive, row 0: missing"),
        (lambda: model().fit(X, Y, GROUP[:5]), "sensitive has 5 values for 60 rows"),
        (lambda: model().fit(X, np.zeros(60), GROUP), "y has one class"),
        (lambda: model().fit(X, np.arange(60) % 3, GROUP), "y has 3 classes"),
        (lambda: model().fit(X, Y[:30], GROUP), "y has 30 values for 60 rows"),
        (lambda: model().fit(X.assign(debt=np.inf), Y, GROUP), "column 'debt', row 0: infinite"),
        (lambda: model().fit(X, Y, GROUP).predict(X.drop(columns="job")), "job"),
        (lambda: model().partial_fit(X, Y, GROUP).partial_fit(X, Y + 5, GROUP), "y, row 0: "),
        (lambda: model(lam=-1.0).fit(X, Y, GROUP), "lam=-1.0; should be at least 0"),
        (lambda: model(n_experts=0).fit(X, Y, GROUP), "n_experts=0; should be at least 1"),
        (lambda: model(max_experts=1).fit(X, Y, GROUP), "max_experts=1; should be at least 2"),
        (lambda: model(fairness="parity").fit(X, Y, GROUP), "fairness='parity'; use one of dp"),
        (lambda: model(merge=1.5).fit(X, Y, GROUP), "merge=1.5; should be a cosine"),
        (lambda: model(learning_rate=0).fit(X, Y, GROUP), "learning_rate=0; should be above 0"),
        (lambda: model(favourable="yes").fit(X, Y, GROUP), r"favourable='yes'; should be one of \[0, 1\]"),
        (lambda: model(n_iter=1).fit(X, Y, GROUP).explain(X, by="row"), "by='row'; use one of"),
    ],
)
def test_what_is_wrong_is_said(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_nothing_is_predicted_explained_or_saved_before_fitting(tmp_path):
    for act in (model().predict, model().explain, model().gate_weights, model().recourse_distance):
        with pytest.raises(NotFittedError):
            act(X)
    with pytest.raises(NotFittedError):
        model().save(tmp_path / "saved")


def test_a_generator_as_random_state_cannot_be_saved(tmp_path):
    made = model(n_iter=1, random_state=np.random.RandomState(0)).fit(X, Y, GROUP)
    with pytest.raises(ValueError, match="use an integer or None"):
        made.save(tmp_path / "saved")


def test_columns_are_taken_by_name_in_whatever_order_they_come():
    made = model(n_iter=2).fit(X, Y, GROUP)
    assert (made.predict_proba(X[X.columns[::-1]]) == made.predict_proba(X)).all()


def test_importing_the_room_imports_neither_scikit_learn_nor_pandas():
    code = "import sys, coterie.tabular; sys.exit(bool({'sklearn', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
