import json

import pandas as pd
import pytest

from coterie.data import sea_drift
from coterie.estimate import Columns, fit, predict
from coterie.estimate import driftmoe as system
from coterie.stream import DriftMoEClassifier, prequential

SETTINGS = ["hidden=[16]", "router_batch=8"]


@pytest.fixture
def table(tmp_path):
    rows = [
        {
            "when": t,
            "a": x[0],
            "b": x[1],
            "sky": "sun" if x[2] > 5 else "rain",
            "class": "UP" if y else "DOWN",
        }
        for t, (x, y) in enumerate(sea_drift(100, seed=0))
    ]
    file = tmp_path / "sea.csv"
    pd.DataFrame(rows).to_csv(file, index=False)
    return file


def columns(**roles):
    return Columns(target=("class",), **roles)


def test_the_report_is_the_prequential_one_and_does_not_depend_on_chunks(table, tmp_path, monkeypatch):
    report = fit("driftmoe", table, tmp_path / "one", columns(time="when"), SETTINGS)["report"]
    frame = pd.read_csv(table)
    rows = list(zip(frame[["a", "b", "sky"]].to_dict("records"), frame["class"], strict=True))
    expected = prequential(DriftMoEClassifier(hidden=(16,), router_batch=8, seed=0), rows).iloc[-1]
    assert (report["instances"], report["classes"]) == (400, 2)
    assert report["accuracy"] == pytest.approx(expected["acc"])
    assert report["kappa-M"] == pytest.approx(expected["kappa_m"])
    assert report["kappa-T"] == pytest.approx(expected["kappa_t"])
    monkeypatch.setattr(system, "_ROWS", 37)
    chunked = fit("driftmoe", table, tmp_path / "many", columns(time="when"), SETTINGS)["report"]
    assert chunked["accuracy"] == report["accuracy"]


def test_what_was_fitted_predicts_another_table(table, tmp_path):
    described = fit("driftmoe", table, tmp_path / "out", columns(time="when"), SETTINGS)
    assert sum(described["usage"]["router"]) == pytest.approx(1)
    later = tmp_path / "later.csv"
    pd.read_csv(table).drop(columns="class").to_csv(later, index=False)
    assert predict(tmp_path / "out", later, tmp_path / "said.csv") == 400
    said = pd.read_csv(tmp_path / "said.csv")
    assert set(said.columns) == {"class", "P(UP)", "P(DOWN)"}
    assert (said["class"] == pd.read_csv(table)["class"]).mean() > 0.8
    assert said.filter(like="P(").sum(axis=1).to_numpy() == pytest.approx(1)


def test_arff_is_fitted_too(table, tmp_path):
    frame = pd.read_csv(table)
    header = "@attribute a real\n@attribute b real\n@attribute class {UP,DOWN}\n@data\n"
    file = tmp_path / "sea.arff"
    file.write_text(header + frame[["a", "b", "class"]].to_csv(index=False, header=False))
    assert fit("driftmoe", file, tmp_path / "out", columns(), SETTINGS)["report"]["instances"] == 400


def test_rows_out_of_order_are_refused_by_their_number(table, tmp_path):
    frame = pd.read_csv(table)
    frame.loc[[7, 8], "when"] = frame.loc[[8, 7], "when"].to_numpy()
    frame.to_csv(table, index=False)
    with pytest.raises(ValueError, match="column 'when', row 8: 7 after 8"):
        fit("driftmoe", table, tmp_path / "out", columns(time="when"), SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("roles", "settings", "message"),
    [
        ({"target": ("class", "a")}, [], "predicts one target"),
        ({"target": ()}, [], "needs --target"),
        ({"target": ("klass",)}, [], "no column 'klass'"),
        ({"target": ("class",)}, ["top_k=13"], "top_k=13 of 12 experts"),
        ({"target": ("class",)}, ["mask=most"], "mask"),
    ],
)
def test_what_cannot_be_is_refused(table, tmp_path, roles, settings, message):
    with pytest.raises(ValueError, match=message):
        fit("driftmoe", table, tmp_path / "out", Columns(**roles), settings)


def test_the_folder_can_be_read_as_json(table, tmp_path):
    fit("driftmoe", table, tmp_path / "out", columns(), SETTINGS)
    assert json.loads((tmp_path / "out" / "estimator" / "estimator.json").read_text())["kind"] == (
        "DriftMoEClassifier"
    )
