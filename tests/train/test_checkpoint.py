import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import TinyMoE, same_tensors, tiny_data, tiny_run
from torch import Tensor, nn

from coterie.models import Decoder, DecoderConfig
from coterie.train import History, LossFreeBias, LossOutput, Run, language_model_loss


class CtrlC:
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_step(self, run: Run) -> None:
        if run.step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def same_numbers(a: History, b: History) -> bool:
    fields = ("step", "loss", "cross_entropy", "lr", "tokens", "imbalance", "evals")
    return all(getattr(a, name) == getattr(b, name) for name in fields)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_interrupted_and_resumed_run_is_bit_identical_to_an_unbroken_one(
    tmp_path: Path, accumulate: int
) -> None:
    bias = LossFreeBias(rate=0.01)
    settings: dict[str, Any] = {
        "steps": 15,  # two and a half epochs
        "accumulate": accumulate,
        "eval_data": tiny_data(seed=1),
        "eval_every": 4,
    }
    unbroken, whole = tiny_run(callbacks=[bias], **settings)
    whole_rng = (random.random(), float(np.random.rand()), torch.rand(1).item())  # noqa: NPY002
    _, half = tiny_run(callbacks=[bias, CtrlC(7)], out=tmp_path, **settings)
    assert half.interrupted
    assert half.step == list(range(1, 9))  # the step under way when the signal is agreed on
    assert names(tmp_path) == ["step-000008"]
    other_start = TinyMoE()
    nn.init.normal_(other_start.out.weight)
    resumed, rest = tiny_run(other_start, callbacks=[bias], out=tmp_path, resume=True, **settings)
    assert not rest.interrupted
    assert same_numbers(whole, rest)
    assert same_tensors(unbroken, resumed)
    assert whole_rng == (random.random(), float(np.random.rand()), torch.rand(1).item())  # noqa: NPY002


def test_run_saved_by_plan_resumes_like_an_unbroken_one_with_tied_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def model() -> Decoder:
        torch.manual_seed(0)
        return Decoder(DecoderConfig(257, 16, 1, 1, 1, 16, 32, num_experts=4, expert_hidden=8))

    class Crash:
        def on_step(self, run: Run) -> None:
            if run.step == 5:
                raise RuntimeError("the power went out")

    unbroken, whole = tiny_run(model(), steps=8)
    with pytest.raises(RuntimeError, match="the power went out"):
        tiny_run(model(), steps=8, out=tmp_path, save_every=2, callbacks=[Crash()])
    assert names(tmp_path) == ["step-000002", "step-000004"]
    resumed, rest = tiny_run(model(), steps=8, out=tmp_path, save_every=2, resume=True)
    assert same_numbers(whole, rest)
    assert same_tensors(unbroken, resumed)
    assert names(tmp_path) == ["step-000006", "step-000008"]  # the last two are kept
    assert not caplog.records  # no warning about tied weights
    assert isinstance(resumed, Decoder)
    assert resumed.lm_head.weight is resumed.embed_tokens.weight


def test_resuming_a_finished_run_returns_its_history(tmp_path: Path) -> None:
    first, history = tiny_run(out=tmp_path, eval_data=tiny_data(seed=1))
    second, again = tiny_run(out=tmp_path, resume=True, eval_data=tiny_data(seed=1))
    assert same_numbers(history, again)
    assert same_tensors(first, second)
    with pytest.raises(ValueError, match=r"step-000006 is beyond steps=3; ask for at least 6"):
        tiny_run(out=tmp_path, resume=True, steps=3)


def test_resuming_nothing_starts_from_scratch_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, history = tiny_run(out=tmp_path / "new", resume=True)
    assert history.steps == 6
    assert f"no checkpoint in {tmp_path / 'new'}; starting from scratch" in capsys.readouterr().err


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    tiny_run(out=tmp_path)
    with pytest.raises(ValueError, match=r"holds a run already \(step-000006\); pass resume=True"):
        tiny_run(out=tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"file is a file; give a folder"):
        tiny_run(out=file)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"dim": 16}, {}, r"the shape of embed\.weight = \[257, 8\] but this run has \[257, 16\]"),
        ({}, {"batch_size": 6}, "batch_size = 4 but this run has 6"),
        ({}, {"seed": 1}, "seed = 0 but this run has 1"),
    ],
)
def test_checkpoint_of_another_run_is_refused_in_one_line(
    tmp_path: Path, model: dict[str, int], settings: dict[str, Any], message: str
) -> None:
    tiny_run(out=tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        tiny_run(TinyMoE(**model), out=tmp_path, resume=True, **settings)
    assert "\n" not in str(error.value)


def test_a_crash_while_saving_leaves_the_earlier_checkpoint_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Accelerator.save_state
    calls = []

    def fails_the_second_time(self: Accelerator, output_dir: str, *args: Any, **kwargs: Any) -> str:
        calls.append(output_dir)
        if len(calls) == 2:
            Path(output_dir, "model.safetensors").write_bytes(b"half")
            raise OSError("no space left on device")
        return str(save(self, output_dir, *args, **kwargs))

    monkeypatch.setattr(Accelerator, "save_state", fails_the_second_time)
    with pytest.raises(OSError, match="no space left"):
        tiny_run(out=tmp_path, save_every=2)
    assert names(tmp_path) == ["step-000002"]
    _, history = tiny_run(out=tmp_path, resume=True)
    assert history.step == [1, 2, 3, 4, 5, 6]


def test_what_a_killed_process_left_is_ignored_and_cleaned(tmp_path: Path) -> None:
    for left in (".step-000004.partial", "step-000009"):  # killed while writing; without its record
        (tmp_path / "checkpoints" / left).mkdir(parents=True)
    tiny_run(out=tmp_path)
    assert names(tmp_path) == ["step-000006", "step-000009"]
    record = json.loads((tmp_path / "checkpoints" / "step-000006" / "run.json").read_text())
    assert record["history"]["step"] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_without_out_returns_the_history_and_restores_the_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    _, history = tiny_run(steps=50, callbacks=[CtrlC(3)])
    assert history.interrupted
    assert history.steps == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_is_immediate() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(callbacks=[CtrlC(3, times=2)])
    assert signal.getsignal(signal.SIGINT) is before


def test_training_outside_the_main_thread_leaves_signals_alone() -> None:
    histories = []
    thread = threading.Thread(target=lambda: histories.append(tiny_run()[1]))
    thread.start()
    thread.join()
    assert histories[0].steps == 6


def broken_at(step: int, gradient_only: bool = False) -> Any:
    """A loss that turns NaN at a step, or is finite there with a NaN gradient."""
    plain, seen = language_model_loss(), []

    def loss(model: nn.Module, ids: Tensor) -> LossOutput:
        output = plain(model, ids)
        seen.append(ids)
        if len(seen) == step:
            if gradient_only:
                output.loss.register_hook(lambda grad: grad * torch.nan)
            else:
                output.loss = output.loss * torch.nan
        return output

    return loss


def test_nan_loss_names_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    good, _ = tiny_run(steps=5, warmup_steps=0, min_lr_ratio=1.0)
    model = TinyMoE()
    torch.manual_seed(0)
    model.load_state_dict(TinyMoE().state_dict())
    with pytest.raises(ValueError, match=r"step 6: loss nan, .* last good checkpoint is .*step-000004"):
        tiny_run(
            model,
            steps=8,
            warmup_steps=0,
            min_lr_ratio=1.0,
            loss=broken_at(6),
            out=tmp_path,
            save_every=2,
        )
    assert same_tensors(model, good)  # the broken step reached no weight


def test_nan_gradient_of_a_finite_loss_is_caught_too() -> None:
    with pytest.raises(
        ValueError, match=r"step 2: loss \d.*, gradient norm nan; no checkpoint was saved"
    ) as error:
        tiny_run(loss=broken_at(2, gradient_only=True))
    assert "\n" not in str(error.value)
