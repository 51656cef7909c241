"""`coterie fit moe-trajectories`, on a wide and a long table, and its experiment on a table of one's own."""

import json

import pandas as pd
import pytest

from coterie.estimate import Columns, fit, predict
from coterie.longitudinal import simulate_trajectories
from coterie.reproduce.moe_trajectories import read_data, variant

LONG = Columns(target=("score",), time="time", group="id")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The same 120 persons in wide.csv and long.csv."""
    folder = tmp_path_factory.mktemp("tables")
    wide = simulate_trajectories(120, seed=5)
    wide.to_csv(folder / "wide.csv", index=False)
    long = pd.wide_to_long(wide, ["Y", "T"], i="id", j="wave").reset_index()
    long = long.rename(columns={"Y": "score", "T": "time"}).sort_values(["id", "time"])
    long.to_csv(folder / "long.csv", index=False)
    return folder


def test_wide_and_long_tables_give_the_same_classes(tables, tmp_path):
    settings = ["n_init=1", "gate=gx1 + gx2"]
    wide = fit("moe-trajectories", tables / "wide.csv", tmp_path / "w", Columns(), ["y=Y", "t=T", *settings])
    long = fit("moe-trajectories", tables / "long.csv", tmp_path / "l", LONG, settings)
    assert wide["report"]["log-likelihood"] == long["report"]["log-likelihood"]
    assert "class 2: knot" in long["report"]
    assert json.loads((tmp_path / "l" / "fit.json").read_text())["usage"]["classes"] == pytest.approx(
        wide["usage"]["classes"], abs=1e-3
    )
    assert predict(tmp_path / "l", tables / "long.csv", tmp_path / "classes.csv") == 120
    classes = pd.read_csv(tmp_path / "classes.csv")
    assert list(classes.columns) == ["id", "class", "p1", "p2"]
    assert (classes[["p1", "p2"]].sum(axis=1) - 1).abs().max() < 1e-9


def test_roles_of_a_long_table_come_together_and_once(tables, tmp_path):
    with pytest.raises(ValueError, match="needs --group, --time and one --target; --target missing"):
        fit("moe-trajectories", tables / "long.csv", tmp_path / "x", Columns(time="time", group="id"))
    with pytest.raises(ValueError, match="y set twice"):
        fit("moe-trajectories", tables / "long.csv", tmp_path / "x", LONG, ["y=score"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("shape", ["wide", "long"])
def test_the_experiment_runs_on_a_table_of_ones_own(tables, tmp_path, shape):
    study = pd.read_csv(tables / f"{shape}.csv").rename(columns={"score": "y"})
    study.to_csv(tmp_path / "study.csv", index=False)
    values = variant(0, "smoke", read_data(tmp_path / "study.csv"), kind="none")
    assert -22 < values["held-out nats"] < -19
    assert "held-out accuracy" not in values


def test_tables_that_the_experiment_cannot_use_say_what_they_lack(tmp_path):
    table = simulate_trajectories(5)
    for name, columns, message in (
        ("a", ["ex1", "ex2"], "lacks columns ex1, ex2, … of the experts"),
        ("b", ["gx1", "gx2"], "lacks columns gx1, gx2, … of the gate"),
        ("c", ["Y1"], "has neither Y1, Y2, … and T1, T2, … .wide. nor id, time and y"),
    ):
        file = tmp_path / f"{name}.csv"
        table.drop(columns=columns).to_csv(file, index=False)
        with pytest.raises(ValueError, match=message):
            read_data(file)
    with pytest.raises(ValueError, match=r"is a file of R.*write\.csv"):
        read_data(tmp_path / "BLS_dat2.RData")
