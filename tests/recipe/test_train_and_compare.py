"""`coterie train lm` and `coterie compare`, end to end on tiny models."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from coterie.recipe import Recipe, compare_recipes, load_trained, train_lm
from coterie.recipe import compare as comparing

COTERIE = str(Path(sys.executable).with_name("coterie"))
SMALL = (
    "model: {dim: 16, layers: 2, heads: 1, kv_heads: 1, head_dim: 16, hidden: 40, expert_hidden: 16}\n"
    "train: {steps: 4, batch_size: 2, seq_len: 32}\n"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("The cat sat on the mat, and the dog lay under the table. " * 300)
    return file


def recipe(text, more="", **changes):
    return replace(Recipe.parse(SMALL + more), text=(str(text),), **changes)


def run(*arguments):
    return subprocess.run([COTERIE, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_a_trained_recipe_comes_back_from_its_folder(text, tmp_path):
    what = recipe(text, "router: {name: top-p, p: 0.4}\n", name="mine")
    report = train_lm(what, tmp_path / "run", progress=False)
    assert report is not None
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "model.safetensors",
        "recipe.yaml",
        "report.html",
        "results.json",
    ]
    assert Recipe.read(tmp_path / "run" / "recipe.yaml") == what
    model, again = load_trained(tmp_path / "run"), load_trained(tmp_path / "run")
    ids = torch.randint(257, (1, 20))
    assert torch.equal(model(ids)[0], again(ids)[0])
    assert report.arms[0].active_parameters < report.arms[0].total_parameters
    with pytest.raises(ValueError, match="holds no trained model"):
        load_trained(tmp_path)


def test_a_model_that_transformers_knows_is_also_a_checkpoint(text, tmp_path):
    train_lm(recipe(text), tmp_path / "run", progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")
    ids = torch.randint(257, (1, 20))
    ours = load_trained(tmp_path / "run")(ids)[0]
    torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-5, rtol=1e-4)


def test_a_dense_model_trains_and_reports_without_experts(text, tmp_path):
    report = train_lm(
        replace(recipe(text), model={**recipe(text).model, "num_experts": 0}), tmp_path / "r", progress=False
    )
    assert report is not None
    assert report.arms[0].imbalance is None
    assert report.passage is None


def test_an_interrupted_training_goes_on_where_it_stopped(text, tmp_path, monkeypatch):
    what = recipe(text, name="a")
    whole = train_lm(what, tmp_path / "whole", progress=False)

    from coterie.recipe import train as training

    def interrupted(*arguments, **options):
        history = comparing.train_method(*arguments, **options)
        history.interrupted = True
        return history

    half = replace(what, train=replace(what.train, steps=4))
    monkeypatch.setattr(training, "train_method", interrupted)
    assert train_lm(half, tmp_path / "half", progress=False) is None
    monkeypatch.undo()
    with pytest.raises(ValueError, match="go on with --resume"):
        train_lm(half, tmp_path / "half", progress=False)
    with pytest.raises(ValueError, match="differs from the recipe given"):
        train_lm(replace(half, name="b"), tmp_path / "half", resume=True)
    resumed = train_lm(None, tmp_path / "half", resume=True, progress=False)
    assert resumed.arms[0].held_out == whole.arms[0].held_out
    with pytest.raises(ValueError, match="no unfinished run"):
        train_lm(None, tmp_path / "half", resume=True)


def test_the_folder_of_something_else_is_left_alone(text, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="no training run"):
        train_lm(recipe(text), tmp_path)


@pytest.mark.parametrize("equal", ["active", "flops"])
def test_recipes_are_compared_at_equal_cost(text, tmp_path, equal):
    dense = replace(recipe(text, name="dense"), model={**recipe(text).model, "num_experts": 0, "hidden": 24})
    recipes = [
        recipe(text, name="top-2"),
        dense,
        recipe(text, "system: {name: moe-plus-plus, capacity_factor: null}\n", name="MoE++"),
    ]
    result = compare_recipes(recipes, equal=equal, seeds=2, out=tmp_path, progress=False)
    row = {"active": "active parameters, M", "flops": "training FLOPs, T"}[equal]
    base = result.values["top-2"][0][row]
    # one unit of width, and one step of four, is as near as it gets
    assert result.values["dense"][0][row] == pytest.approx(base, rel=0.02 if equal == "active" else 0.25)
    assert [len(each) for each in result.values.values()] == [2, 2, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.json"]
    assert result.headline in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["seeds"] == [0, 1]


def test_an_interrupted_comparison_keeps_what_is_finished(text, tmp_path, monkeypatch):
    recipes = [recipe(text, name="a"), recipe(text, name="b")]
    trained = []

    def train(what, seed):
        trained.append(what.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return {"held-out bits per byte": 1.0, comparing.CURVE.curve: [(1, 1.0)]}

    monkeypatch.setattr(comparing, "_train", train)
    with pytest.raises(KeyboardInterrupt):
        compare_recipes(recipes, equal="steps", out=tmp_path, progress=False)
    compare_recipes(recipes, equal="steps", out=tmp_path, progress=False)
    assert trained == ["a", "b", "b"]


def test_what_cannot_be_compared_is_refused(text, tmp_path):
    one = recipe(text, name="a")
    with pytest.raises(ValueError, match="each needs a name of its own"):
        compare_recipes([one, one], out=tmp_path)
    other = replace(one, name="b", text=("other.txt",))
    with pytest.raises(ValueError, match="must be measured on the same text"):
        compare_recipes([one, other], out=tmp_path)
    with pytest.raises(ValueError, match="did you mean 'flops'"):
        compare_recipes([one], equal="flop", out=tmp_path)
    with pytest.raises(ValueError, match="no recipe"):
        compare_recipes([], out=tmp_path)
    large = replace(one, name="large", model={**one.model, "dim": 64})
    with pytest.raises(ValueError, match="no width brings it"):
        compare_recipes([one, large], out=tmp_path, progress=False)


def test_the_commands(text, tmp_path):
    file = tmp_path / "top2.yaml"
    file.write_text(f"text: {text}\n{SMALL}")
    done = run(
        "train", "lm", file, "--router", "top-p", "--router.p=0.3", "--out", tmp_path / "run", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["arms"][0]["label"] == "top2"
    assert "p: 0.3" in (tmp_path / "run" / "recipe.yaml").read_text()
    wrong = run("train", "lm", file, "--router", "top-p", "--router.pp", "0.3", "--out", tmp_path / "x")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "did you mean 'p'?" in wrong.stderr
    assert not (tmp_path / "x").exists()
    assert run("train", "lm", file, "--nonsense", "3").returncode == 2
    assert "one recipe" in run("train", "lm", file, file).stderr
    small = ("--model.layers", 1, "--train.steps", 2, "--train.batch-size=2", "--train.seq-len", 32)
    without = run("train", "lm", *small, "--router", "switch", "--text", text, "--out", tmp_path / "y")
    assert without.returncode == 0, without.stderr
    compared = run("compare", file, "--equal", "steps", "--out", tmp_path / "compare")
    assert compared.returncode == 0, compared.stderr
    assert "held-out bits per byte" in compared.stdout
    assert "--router.p: float" in run("train", "parts").stdout
