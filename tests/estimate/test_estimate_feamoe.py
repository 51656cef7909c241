import json

import numpy as np
import pandas as pd
import pytest

from coterie.data import read_table
from coterie.estimate import Columns, fit, predict
from coterie.tabular import FEAMOEClassifier, demographic_parity_gap

QUICK = ["n_iter=30", "random_state=0", "chunk_size=300"]
COLUMNS = Columns(target=("repaid",), sensitive="group")


def loans(rows=1000, seed=0):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"day": np.arange(rows) // 50, "income": rng.normal(40, 10, rows)})
    table["job"] = rng.choice(["baker", "smith"], rows)
    table["group"] = rng.choice(["x", "y"], rows)
    table["repaid"] = np.where(table["income"] + rng.normal(0, 5, rows) > 40, "yes", "no")
    return table


@pytest.fixture
def file(tmp_path):
    loans().to_csv(tmp_path / "loans.csv", index=False)
    return tmp_path / "loans.csv"


def test_in_the_order_of_time_each_chunk_is_scored_before_it_is_learnt_from(file, tmp_path):
    described = fit("feamoe", file, tmp_path / "out", Columns(**(vars(COLUMNS) | {"time": "day"})), QUICK)
    table = loans()
    by_hand = FEAMOEClassifier(n_iter=30, random_state=0)
    X, hits, decided = table[["income", "job"]], [], []
    for rows in (slice(0, 300), slice(300, 600), slice(600, 1000)):  # the rest is less than half a chunk
        if rows.start:
            decided.append(by_hand.predict(X[rows]))
            hits.append(decided[-1] == table["repaid"][rows])
        by_hand.partial_fit(X[rows], table["repaid"][rows], table["group"][rows])
    report = described["report"]
    assert report["rows scored"] == 700
    assert report["accuracy"] == pytest.approx(np.concatenate(hits).mean())
    gap = demographic_parity_gap(np.concatenate(decided) == "yes", table["group"][300:])
    assert report["dp gap"] == pytest.approx(gap)
    assert (report["chunks"], report["experts"]) == (3, by_hand.n_experts_)


def test_without_time_a_part_of_every_chunk_is_held_out(file, tmp_path):
    described = fit("feamoe", file, tmp_path / "out", COLUMNS, QUICK)
    assert 250 < described["report"]["rows scored"] < 350
    assert described["report"]["accuracy"] > 0.7
    assert sum(described["usage"]["gate"]) == pytest.approx(1)
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["report"] == described["report"]
    assert (tmp_path / "out" / "experts.png").exists()


def test_predictions_are_those_of_the_estimator_in_the_order_of_the_file(file, tmp_path):
    fit("feamoe", file, tmp_path / "out", COLUMNS, QUICK)
    assert predict(tmp_path / "out", file, tmp_path / "decisions.csv") == 1000
    decisions = read_table(tmp_path / "decisions.csv")
    model = FEAMOEClassifier.load(tmp_path / "out" / "estimator")
    assert model.columns_ == ["day", "income", "job"]
    expected = model.predict_proba(loans()[model.columns_])
    assert decisions["probability of yes"].to_numpy() == pytest.approx(expected[:, 1])
    assert decisions["repaid"].tolist() == model.predict(loans()[model.columns_]).tolist()


def test_a_register_of_mortgages_is_read_as_published(tmp_path):
    rng = np.random.default_rng(0)
    rows = 900
    income = rng.normal(80, 20, rows)
    register = pd.DataFrame(
        {
            "activity_year": np.sort(rng.choice([2018, 2019], rows)),
            "action_taken": np.where(rng.random(rows) < 0.3, 4, np.where(income > 80, 1, 3)),
            "loan_amount": 1000 * income,
            "income": income,
            "debt_to_income_ratio": rng.choice(["<20%", "20%-<30%", "36", "Exempt"], rows),
            "loan_to_value_ratio": rng.choice(["80", "95.5", "Exempt"], rows),
            "derived_race": rng.choice(["a", "b"], rows),
        }
    )
    register.to_csv(tmp_path / "lar.csv", index=False)
    columns = Columns(target=("action_taken",), sensitive="derived_race", time="activity_year")
    report = fit("feamoe", tmp_path / "lar.csv", tmp_path / "out", columns, ["chunk_size=200"])["report"]
    assert report["chunks"] == 2  # some 630 rows were decided on; what each read leaves is gathered
    assert report["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (Columns(target=("repaid",)), [], "feamoe needs --sensitive COLUMN, or --set fairness=null"),
        (Columns(target=("repaid", "job"), sensitive="group"), [], "predicts one target"),
        (Columns(target=("job",), sensitive="race"), [], "no column 'race'"),
        (Columns(("repaid",), time="income", sensitive="group"), [], "column 'income' goes back at row"),
        (Columns(("repaid",), time="day", sensitive="group"), ["chunk_size=900"], "leaves none to score"),
        (Columns(("day",), sensitive="group"), [], "classes"),
        (Columns(("repaid",), sensitive="group"), ["lam=-1"], "lam=-1.0; should be at least 0"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(file, tmp_path, columns, settings, message):
    with pytest.raises(ValueError, match=message):
        fit("feamoe", file, tmp_path / "out", columns, settings)
    assert not (tmp_path / "out").exists()
