"""coterie unlearn, interrupted and started again; and its speed beside that of the checkpoint."""

import importlib
import json
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from tiny_moe import arguments

from coterie.hf import load
from coterie.tune import attribute
from coterie.tune import checkpoint as unlearning

training = importlib.import_module("coterie.tune.unlearn")  # whose name in the package is the function's

pytestmark = pytest.mark.filterwarnings("ignore:expert . of model:UserWarning")  # near ties


def result(out):
    """What is written, without what a clock says and where it lies."""
    done = json.loads((out / "unlearned.json").read_text())
    for model in (done["before"], done["after"]):
        assert model.pop("speed") > 0
    assert done.pop("out") == str(out)
    return done, load_file(out / "model.safetensors")


def assert_same(one, other):
    (a, weights), (b, others) = result(one), result(other)
    assert a == b
    assert weights.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def nothing_but(*names, folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(["forget.pt", "retain.pt", *names])


def ctrl_c(*args, **options):
    signal.raise_signal(signal.SIGINT)


@contextmanager
def failing(monkeypatch, module, name, fail, at=1):
    """Inside, the n-th call of a function is followed by something else."""
    calls, function = [], getattr(module, name)

    def call(*args, **options):
        calls.append(0)
        found = function(*args, **options)
        if len(calls) == at:
            fail()
        return found

    with monkeypatch.context() as patched:
        patched.setattr(module, name, call)
        yield calls


def full(*args, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("options", [["--method", "npo"], ["--method", "rmu", "--scope", "all"]])
def test_wherever_ctrl_c_strikes_the_same_command_writes_the_same(
    coterie,
    checkpoint,
    texts,
    tmp_path,
    monkeypatch,
    options,
):
    options = [*options, "--steps", 6]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert coterie(*arguments(checkpoint, texts, whole, *options))[0] == 0
    for module, name, at in [
        (attribute, "route", 2),  # in the search for experts
        (training, "backward", 1),
        (training, "backward", 2),
        (unlearning, "interleaved_speed", 1),  # after training
        (unlearning, "save", 1),  # while it is written
    ]:
        with failing(monkeypatch, module, name, ctrl_c, at):
            status, printed, err = coterie(*arguments(checkpoint, texts, out, *options))
        assert (status, printed) == (130, "")
        assert err.endswith("coterie: interrupted; the same command goes on with what is left\n")
        nothing_but("whole", "out.calibration", folder=tmp_path)
    with (
        failing(monkeypatch, attribute, "route", ctrl_c, 0) as searched,
        failing(monkeypatch, training, "backward", ctrl_c, 0) as trained,
    ):
        status, _, err = coterie(*arguments(checkpoint, texts, out, *options))
    assert status == 0, err
    assert (searched, trained) == ([], []), "what was done is not done again"
    assert "going on after step 6" in err
    assert_same(whole, out)
    nothing_but("whole", "out", folder=tmp_path)


def test_on_a_full_disk_it_is_one_line_and_goes_on_when_there_is_space(
    coterie,
    checkpoint,
    texts,
    tmp_path,
    monkeypatch,
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ["--steps", 6]
    assert coterie(*arguments(checkpoint, texts, whole, *options))[0] == 0
    with failing(monkeypatch, unlearning, "save", full):
        status, _, err = coterie(*arguments(checkpoint, texts, out, *options))
    assert status == 2
    assert err.splitlines()[-1] == (
        f"coterie: cannot write {out}: [Errno 28] No space left on device; "
        "nothing was left behind, and the same command goes on from here"
    )
    nothing_but("whole", "out.calibration", folder=tmp_path)
    with failing(monkeypatch, training, "backward", ctrl_c) as trained:
        assert coterie(*arguments(checkpoint, texts, out, *options))[0] == 0
    assert trained == []
    assert_same(whole, out)
    nothing_but("whole", "out", folder=tmp_path)


def test_a_full_disk_while_it_trains_is_one_line(coterie, checkpoint, texts, tmp_path):
    (tmp_path / "out.calibration").write_text("a file in its way")
    status, _, err = coterie(*arguments(checkpoint, texts, tmp_path / "out"))
    assert status == 2
    assert "coterie: cannot keep what was done in" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "other",
    [["--lr", 1e-3], ["--method", "gdiff"], ["--seed", 1], ["--batch-size", 3], ["--scope", "router"]],
)
def test_what_another_run_kept_is_not_used_and_stays(
    coterie,
    checkpoint,
    texts,
    tmp_path,
    monkeypatch,
    other,
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    with failing(monkeypatch, training, "backward", ctrl_c, 2):
        assert coterie(*arguments(checkpoint, texts, out, "--steps", 3))[0] == 130
    [kept] = (tmp_path / "out.calibration").iterdir()
    status, _, err = coterie(*arguments(checkpoint, texts, out, "--steps", 3, *other))
    assert status == 0
    assert f"{kept.parent} is of another text, model or option: starting anew" in err
    assert coterie(*arguments(checkpoint, texts, whole, "--steps", 3, *other))[0] == 0
    assert_same(whole, out)
    assert list(kept.parent.iterdir()) == [kept]


def test_more_steps_go_on(coterie, checkpoint, texts, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert coterie(*arguments(checkpoint, texts, whole, "--steps", 8))[0] == 0
    with failing(monkeypatch, unlearning, "save", full):
        assert coterie(*arguments(checkpoint, texts, out, "--steps", 3))[0] == 2
    status, _, err = coterie(*arguments(checkpoint, texts, out, "--steps", 8))
    assert status == 0
    assert "going on after step 3" in err
    assert_same(whole, out)


def test_damage_is_one_line_and_the_result_the_same(
    coterie,
    checkpoint,
    texts,
    tmp_path,
    monkeypatch,
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert coterie(*arguments(checkpoint, texts, whole, "--steps", 3))[0] == 0
    with failing(monkeypatch, unlearning, "save", full):
        assert coterie(*arguments(checkpoint, texts, out, "--steps", 3))[0] == 2
    files = sorted((tmp_path / "out.calibration").rglob("*.safetensors"))
    for file in files:
        file.write_bytes(file.read_bytes()[:-8])
    status, _, err = coterie(*arguments(checkpoint, texts, out, "--steps", 3))
    assert status == 0
    assert [f"{file} is damaged: what it held is done anew" in err for file in files] == [True, True]
    assert_same(whole, out)


def test_speed_is_of_both_models_by_turns(checkpoint, texts, tmp_path, monkeypatch):
    found = []

    def spied(model, changed, ids_BS):
        found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        with changed():
            found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return 30.0, 20.0

    monkeypatch.setattr(unlearning, "interleaved_speed", spied)
    done = unlearning.unlearn_checkpoint(
        checkpoint,
        tmp_path / "out",
        forget=texts[0],
        retain=texts[1],
        steps=2,
        seq_len=16,
        batch_size=4,
        progress=False,
    )
    for folder, model, speed in [
        (tmp_path / "out", found[0], done.after),
        (checkpoint, found[1], done.before),
    ]:
        assert all(torch.equal(model[name], t) for name, t in load(folder).state_dict().items())
        assert speed.speed == (30.0 if model is found[0] else 20.0)
    assert len(found) == 2
