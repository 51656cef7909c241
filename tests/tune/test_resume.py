"""A run that is interrupted, anywhere, ends as one that is not, bit by bit."""

import itertools
import signal

import pytest
import torch
from safetensors import safe_open
from tiny_moe import tiny_moe, two_texts

from coterie.tune import Batch, Target, attribute_experts, unlearn
from coterie.tune.kept import Kept
from coterie.tune.measure import predict

FORGET, RETAIN = ([Batch(part) for part in text.split(1)] for text in two_texts(repeats=2))
OPTIONS = {"targets": [Target(1, 1)], "steps": 7, "lr": 3e-3, "evaluate_every": 3}


def accuracies(model):
    return {"forget": predict(model, FORGET).accuracy, "retain": predict(model, RETAIN).accuracy}


@pytest.fixture
def new(_taught):
    """Makes the taught model anew, in a type."""

    def make(dtype=torch.float32):
        model = tiny_moe()
        model.load_state_dict(_taught)
        return model.to(dtype)

    return make


@pytest.fixture
def keep(tmp_path):
    said = []
    kept = Kept(tmp_path / "kept", every=2, say=said.append)
    return kept, said


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def at(step, do):
    """An `on_step` that does something after this step."""
    return lambda now: do() if now.step == step else None


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def die():
    raise MemoryError


def run(model, **options):
    return unlearn(model, FORGET, RETAIN, evaluate=accuracies, **OPTIONS | options)


@pytest.mark.parametrize("method", ["ga", "gdiff", "npo", "rmu", "kl"])
def test_after_ctrl_c_it_ends_as_an_unbroken_run(new, keep, method):
    whole, broken = new(), new()
    expected = run(whole, method=method)
    with pytest.raises(KeyboardInterrupt):
        run(broken, method=method, keep=keep[0], on_step=at(3, ctrl_c))
    assert not same(broken, new())
    again, ran = new(), []
    done = run(again, method=method, keep=keep[0], on_step=lambda step: ran.append(step.step))
    assert ran == [3, 4, 5, 6, 7], "the steps that were done are not done again"
    assert keep[1] == ["going on after step 3"]
    assert done.history[1:] == expected.history[1:]
    assert done.history[0].measured == expected.history[0].measured
    assert (done.targets, done.trained, done.reached) == (
        expected.targets,
        expected.trained,
        expected.reached,
    )
    assert same(again, whole)


@pytest.mark.parametrize("scope", ["experts", "router", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_is_trained_and_in_whatever_type(new, keep, scope, dtype):
    options = {"method": "npo", "scope": scope}
    whole, broken, again = (new(dtype) for _ in range(3))
    expected = run(whole, **options)
    with pytest.raises(KeyboardInterrupt):
        run(broken, **options, keep=keep[0], on_step=at(5, ctrl_c))
    assert run(again, **options, keep=keep[0]).history[1:] == expected.history[1:]
    assert same(again, whole)


@pytest.mark.parametrize("step", range(1, 8))
def test_killed_after_any_step_it_goes_on_from_the_last_that_was_kept(new, keep, step):
    whole, again = new(), new()
    expected = run(whole, method="rmu")
    with pytest.raises(MemoryError):
        run(new(), method="rmu", keep=keep[0], on_step=at(step, die))
    done = run(again, method="rmu", keep=keep[0])
    assert keep[1] == ([f"going on after step {(step - 1) // 2 * 2}"] if step > 2 else [])
    assert done.history[1:] == expected.history[1:]
    assert same(again, whole)


def test_when_all_steps_were_done_none_is_done_again(new, keep):
    whole, again, ran = new(), new(), []
    expected = run(whole, keep=keep[0])
    done = run(again, keep=keep[0], on_step=lambda step: ran.append(step.step))
    assert ran == [7]
    assert done.history[1:] == expected.history[1:]
    assert same(again, whole)


def test_many_interruptions_are_no_different_from_one(new, keep):
    whole = new()
    expected = run(whole)
    for step in (1, 2, 4, 6):
        with pytest.raises(KeyboardInterrupt):
            run(new(), keep=keep[0], on_step=at(step, ctrl_c))
    again = new()
    assert run(again, keep=keep[0]).history[1:] == expected.history[1:]
    assert same(again, whole)


@pytest.mark.parametrize(("first", "then"), [(4, 7), (7, 9), (3, 4)])
def test_more_steps_go_on_and_measure_where_an_unbroken_run_does(new, keep, first, then):
    whole, again = new(), new()
    expected = run(whole, steps=then)
    run(new(), steps=first, keep=keep[0])
    assert run(again, steps=then, keep=keep[0]).history[1:] == expected.history[1:]
    assert keep[1] == [f"going on after step {first}"]
    assert same(again, whole)


def test_as_many_steps_as_were_done_are_measured_at_the_last(new, keep):
    whole, again = new(), new()
    expected = run(whole, steps=4)
    with pytest.raises(KeyboardInterrupt):
        run(new(), keep=keep[0], on_step=at(4, ctrl_c))
    done = run(again, steps=4, keep=keep[0])
    assert done.history[-1].measured
    assert done.history[1:] == expected.history[1:]
    assert same(again, whole)


def test_fewer_steps_start_anew_and_say_so(new, keep):
    whole, again = new(), new()
    run(new(), keep=keep[0])
    expected = run(whole, steps=5)
    assert run(again, steps=5, keep=keep[0]).history[1:] == expected.history[1:]
    assert keep[1] == ["7 steps were kept, and 5 are asked for: training starts anew"]
    assert same(again, whole)


def test_another_level_to_stop_at_goes_on_where_that_is_exact(new, keep):
    options = {"method": "gdiff", "steps": 60, "lr": 5e-3}
    whole, again = new(), new()
    first = run(new(), **options, stop_at=0.8, keep=keep[0])
    assert first.reached
    expected = run(whole, **options, stop_at=0.5)
    done = run(again, **options, stop_at=0.5, keep=keep[0])
    assert expected.reached
    assert done.history[1:] == expected.history[1:]
    assert len(done.history) > len(first.history)
    assert same(again, whole)
    # a level that was passed before the end would have stopped it there
    early, late = new(), new()
    expected = run(early, **options, stop_at=0.8)
    assert run(late, **options, stop_at=0.8, keep=keep[0]).history[1:] == expected.history[1:]
    assert keep[1][-1].endswith("training starts anew")
    assert same(early, late)


def test_the_search_for_experts_goes_on_after_the_last_batch(new, keep):
    model, calls = new(), itertools.count(1)
    expected = attribute_experts(model, FORGET)

    def interrupt():
        if next(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attribute_experts(model, FORGET, keep=keep[0], on_batch=interrupt)
    ran = []
    model.register_forward_hook(lambda *_: ran.append(0))
    for batches in (1, 0):
        ran.clear()
        found = attribute_experts(model, FORGET, keep=keep[0])
        assert len(ran) == batches
        assert torch.equal(found.scores_LE, expected.scores_LE)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lr", 1e-3, r"kept with lr = 0\.003, and this run has 0\.001"),
        ("method", "gdiff", "kept with method = ga, and this run has gdiff"),
        ("targets", [Target(0, 1)], r"kept with targets = \[\[1, 1\]\], and this run has \[\[0, 1\]\]"),
        ("seed", 1, "kept with seed = 0"),
        ("evaluate_every", 2, "kept with evaluate_every = 3"),
    ],
)
def test_what_was_kept_for_another_run_is_refused_and_stays(new, keep, option, value, message):
    run(new(), keep=keep[0])
    with pytest.raises(ValueError, match=message):
        run(new(), keep=keep[0], **{option: value})
    run(new(), keep=keep[0])
    assert keep[1] == ["going on after step 7"]


def test_other_text_or_a_model_that_is_trained_already_is_refused(new, keep):
    model = new()
    run(model, keep=keep[0])
    with pytest.raises(ValueError, match="kept with the weights before training"):
        run(model, keep=keep[0])
    with pytest.raises(ValueError, match="kept with the text to forget"):
        unlearn(new(), FORGET[:2], RETAIN, evaluate=accuracies, keep=keep[0], **OPTIONS)
    attribute_experts(new(), FORGET, keep=keep[0])
    with pytest.raises(ValueError, match="kept with the routers"):
        attribute_experts(model, FORGET, keep=keep[0])


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize("harm", [cut, flip, lambda content: b"", lambda content: b"no safetensors at all"])
def test_what_is_damaged_is_done_anew_and_said(new, keep, harm):
    whole, again = new(), new()
    options = {"targets": None}
    expected = run(whole, **options, keep=keep[0])
    files = sorted(keep[0].folder.iterdir())
    assert [file.name for file in files] == ["affinity.safetensors", "training.safetensors"]
    for file in files:
        file.write_bytes(harm(file.read_bytes()))
    done = run(again, **options, keep=keep[0])
    assert keep[1] == [f"{file} is damaged: what it held is done anew" for file in files]
    assert done.history[1:] == expected.history[1:]
    assert same(again, whole)


def test_only_what_is_trained_is_kept(new, keep):
    done = run(new(), keep=keep[0])
    [file] = keep[0].folder.iterdir()
    with safe_open(file, "pt") as stored:
        tensors = [stored.get_tensor(name) for name in stored.keys()]  # noqa: SIM118
    assert sum(t.numel() for t in tensors if t.dim()) == 3 * done.trained


def test_what_cannot_be_kept_is_said_in_one_line(new, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"cannot keep what was done in .*taken"):
        run(new(), keep=Kept(tmp_path / "taken", every=1))


def test_what_cannot_be_read_is_said_in_one_line(new, keep):
    (keep[0].folder / "training.safetensors").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot read .*training\.safetensors"):
        run(new(), keep=keep[0])


def test_keeping_changes_nothing(new, keep):
    plain, kept = new(), new()
    assert run(plain).history[1:] == run(kept, keep=keep[0]).history[1:]
    assert same(plain, kept)


def test_keeping_more_often_than_every_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every=0; use at least 1 step"):
        Kept(tmp_path, every=0)
