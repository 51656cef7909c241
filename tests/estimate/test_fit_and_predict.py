"""`coterie fit` and `predict` on files, and what they say when something is wrong."""

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from coterie.cli import app
from coterie.estimate import Columns, fit, predict


@pytest.fixture
def table(tmp_path):
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({"x": generator.normal(size=200), "kind": generator.choice(["a", "b"], 200)})
    frame["y"] = frame["x"] * 2 + (frame["kind"] == "a")
    frame["label"] = np.where(frame["y"] > 0, "high", "low")
    frame.to_csv(tmp_path / "t.csv", index=False)
    return tmp_path / "t.csv"


def run(*arguments: object) -> object:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_numbers_are_fitted_and_predicted_from_the_command_line(table, tmp_path):
    out = tmp_path / "model"
    settings = ("--set", "epochs=30", "--set", "num-experts=4")
    result = run(
        "fit",
        "comet-trees",
        "--data",
        table,
        "--target",
        "y",
        "--feature",
        "x",
        "--feature",
        "kind",
        "--out",
        out,
        *settings,
    )
    assert result.exit_code == 0, result.output
    described = json.loads((out / "fit.json").read_text())
    assert described["report"]["R²"] > 0.9
    assert len(described["usage"]["gate"]) == 4
    assert (out / "experts.png").stat().st_size > 1000
    result = run("predict", out, "--data", table, "--out", tmp_path / "p.parquet")
    assert result.exit_code == 0, result.output
    predicted = pd.read_parquet(tmp_path / "p.parquet")["y"]
    assert np.corrcoef(predicted, pd.read_csv(table)["y"])[0, 1] > 0.95


def test_classes_are_predicted_with_probabilities_to_the_terminal(table, tmp_path):
    out = tmp_path / "model"
    described = fit(
        "comet-trees", table, out, Columns(target=("label",), features=("x", "kind")), ["epochs=20"]
    )
    assert described["report"]["accuracy"] > 0.8
    result = run("predict", out, "--data", table)
    lines = result.output.strip().splitlines()
    assert lines[0] == "label,probability of high,probability of low"
    assert len(lines) == 201


def test_a_fit_replaces_an_earlier_one(table, tmp_path):
    columns = Columns(target=("y",), features=("x",))
    for experts in (2, 3):
        fit("comet-trees", table, tmp_path / "m", columns, [f"num_experts={experts}", "epochs=1"])
    assert json.loads((tmp_path / "m" / "fit.json").read_text())["settings"]["num_experts"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "t.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "comet", "--target", "y"], "did you mean 'comet-trees'?"),
        (["fit", "comet-trees"], "comet-trees needs --target COLUMN"),
        (["fit", "comet-trees", "--target", "y", "--item", "x"], "no use for --item"),
        (["fit", "comet-trees", "--target", "z"], "has no column 'z'; it has x, kind, y, label"),
        (["fit", "comet-trees", "--target", "y", "--target", "x"], "predicts one column"),
        (["fit", "comet-trees", "--target", "y", "--set", "expert=4"], "has no option 'expert'"),
        (["fit", "comet-trees", "--target", "y", "--set", "k=two"], "k is 'two'; should be int"),
        (["fit", "comet-trees", "--target", "y", "--set", "k"], "should be name=value"),
        (["fit", "comet-trees", "--target", "y", "--set", "k=9"], "k=9"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(table, tmp_path, monkeypatch, capsys, arguments, message):
    from coterie.cli import main

    full = ["coterie", *arguments, "--data", str(table), "--out", str(tmp_path / "m")]
    monkeypatch.setattr("sys.argv", full)
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_missing_targets_name_their_row(table, tmp_path):
    frame = pd.read_csv(table)
    frame.loc[17, "y"] = np.nan
    frame.to_csv(table, index=False)
    with pytest.raises(ValueError, match="column 'y', row 17: the target is missing"):
        fit("comet-trees", table, tmp_path / "m", Columns(target=("y",)))


def test_predict_refuses_other_folders_and_tables(table, tmp_path):
    with pytest.raises(ValueError, match=r"no fit.json"):
        predict(tmp_path, table)
    fit("comet-trees", table, tmp_path / "m", Columns(target=("y",), features=("x",)), ["epochs=1"])
    (tmp_path / "other.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match="no column 'x'"):
        predict(tmp_path / "m", tmp_path / "other.csv", tmp_path / "p.csv")
    with pytest.raises(ValueError, match=r"a .csv or .parquet file"):
        predict(tmp_path / "m", table, tmp_path / "p.xlsx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "other.csv", "t.csv"]
