import math
import signal
from typing import Any

import pytest
import torch
from tiny import TinyMoE, same_tensors, tiny_data, tiny_run
from torch import nn

from coterie.models import Decoder, DecoderConfig
from coterie.train import (
    Every,
    History,
    LossFreeBias,
    LossOutput,
    Run,
    cosine_with_warmup,
    fit,
    language_model_loss,
    weight_decay_groups,
)


def test_loss_falls_and_history_records_every_step() -> None:
    model, history = tiny_run(steps=40, eval_data=tiny_data(seed=1), eval_every=15, label="tiny")
    assert history.step == list(range(1, 41))
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert all(ce < loss for ce, loss in zip(history.cross_entropy, history.loss, strict=True))
    assert history.tokens == [32] * 40
    assert all(1 <= value <= 4 for value in history.imbalance if value is not None)
    assert [e["step"] for e in history.evals] == [15, 30, 40]
    assert history.evals[-1]["bits_per_token"] < history.evals[0]["bits_per_token"] < 8
    assert not history.interrupted
    assert not history.stopped_early
    assert model.training
    assert History.from_json(history.to_json()) == history


def test_learning_rate_follows_the_schedule() -> None:
    _, history = tiny_run(steps=10, lr=0.5, warmup_steps=3, min_lr_ratio=0.2)
    expected = [0.5 * cosine_with_warmup(step, 10, warmup=3, min_ratio=0.2) for step in range(10)]
    assert history.lr == expected
    assert history.lr[2] == max(history.lr) == 0.5
    assert history.lr[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [0, 1, 4, 10])
def test_schedule_rises_to_one_then_falls_to_its_floor(warmup: int) -> None:
    values = [cosine_with_warmup(step, 10, warmup=warmup, min_ratio=0.1) for step in range(10)]
    peak = max(warmup - 1, 0)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert values[peak] == 1
    if peak < 9:
        assert values[-1] == pytest.approx(0.1)
    assert cosine_with_warmup(99, 10, warmup=warmup, min_ratio=0.1) == pytest.approx(0.1)


def test_only_matrices_decay() -> None:
    config = DecoderConfig(
        257,
        dim=16,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=16,
        hidden=32,
        num_experts=4,
        expert_hidden=8,
    )
    model = nn.ModuleDict({"decoder": Decoder(config), "norm2d": nn.LayerNorm((2, 3))})
    model["bank"] = nn.Module()
    model["bank"].register_parameter("down_bias", nn.Parameter(torch.zeros(4, 8)))
    model["frozen"] = nn.Linear(2, 2).requires_grad_(False)
    decayed, spared = (group["params"] for group in weight_decay_groups(model, 0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[0].rsplit(".", 1)[-1] for p in decayed} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "experts",
        "score",
    }
    spared_names = {names[id(p)] for p in spared}
    assert {"decoder.embed_tokens.weight", "norm2d.weight", "bank.down_bias"} <= spared_names
    assert len(decayed) + len(spared) == len(list(model.parameters())) - 2  # each once, the frozen two not


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_micro_batches_give_the_step_of_the_joined_batch(accumulate: int) -> None:
    settings: dict[str, Any] = {"loss": language_model_loss(balance=0.0), "grad_clip": 0.3}
    joined, whole = tiny_run(TinyMoE(dropout=0.0).double(), **settings)
    torch.manual_seed(0)
    parts, pieces = tiny_run(_copy_of_start(TinyMoE(dropout=0.0).double()), accumulate=accumulate, **settings)
    torch.testing.assert_close(pieces.loss, whole.loss, rtol=1e-12, atol=0)
    for a, b in zip(joined.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert pieces.imbalance == whole.imbalance  # loads are summed before they are compared


def test_clipping_limits_the_norm_of_the_gradient() -> None:
    norms = []

    def loss(model: nn.Module, ids: torch.Tensor) -> LossOutput:
        value = 1e3 * model(ids)[0].square().mean()
        return LossOutput(value, value.detach(), ids.numel())

    class Norm:
        def on_step(self, run: Run) -> None:
            exp_avg = [state["exp_avg"] for state in run.optimizer.state.values()]
            norms.append(torch.cat([m.flatten() for m in exp_avg]).norm().item() / 0.1)

    tiny_run(steps=1, loss=loss, grad_clip=0.25, callbacks=[Norm()])
    assert norms[0] == pytest.approx(0.25, rel=1e-3)


def test_the_same_arguments_give_the_same_run_and_another_seed_another_one() -> None:
    (a, first), (b, second), (_, other) = (tiny_run(seed=seed) for seed in (0, 0, 1))
    assert same_tensors(a, b)
    assert first.loss == second.loss != other.loss


def test_time_budget_stops_after_a_final_evaluation() -> None:
    _, history = tiny_run(steps=1000, minutes=1e-9, eval_data=tiny_data(seed=1))
    assert history.stopped_early
    assert history.step == [1]
    assert [e["step"] for e in history.evals] == [1]


def test_callbacks_see_the_model_and_the_global_loads() -> None:
    runs: list[Run] = []

    class Watch:
        def on_step(self, run: Run) -> None:
            runs.append(run)

    model, history = tiny_run(accumulate=2, callbacks=[Watch()])
    assert [run.step for run in runs] == history.step
    assert all(run.model is model and run.steps == 6 for run in runs)
    assert [run.loss for run in runs] == history.loss
    assert all(run.loads[0].sum() == 4 * 8 * 2 and run.loads[0].dtype == torch.int64 for run in runs)
    assert {"balance", "entropy", "cross_entropy"} == set(runs[0].metrics)


def test_loss_free_bias_moves_against_the_load() -> None:
    loads: list[torch.Tensor] = []

    class Watch:
        def on_step(self, run: Run) -> None:
            loads.append(run.loads[0].double())

    model, _ = tiny_run(steps=5, callbacks=[Watch(), LossFreeBias(rate=0.5)])
    expected = sum(0.5 * torch.sign(load.mean() - load) for load in loads)
    assert isinstance(model, TinyMoE)
    torch.testing.assert_close(model.moe.router.select.bias.double(), expected)


def test_every_calls_after_each_nth_step_with_the_model() -> None:
    calls: list[tuple[bool, int]] = []
    every = Every(2, lambda model, step: calls.append((isinstance(model, TinyMoE), step)))
    tiny_run(steps=5, callbacks=[every])
    assert calls == [(True, 2), (True, 4)]
    with pytest.raises(ValueError, match="steps=0; should be at least 1"):
        Every(0, every.call)


def test_loss_free_bias_without_biases_says_so() -> None:
    config = DecoderConfig(257, 16, 2, 1, 1, 16, 32, num_experts=4, expert_hidden=8)
    with pytest.raises(ValueError, match=r"biases over \[\] experts but routed layers over \[4, 4\]"):
        tiny_run(Decoder(config), callbacks=[LossFreeBias()])


def test_mixed_precision_leaves_the_model_as_it_was(another_precision: None) -> None:
    model, history = tiny_run(mixed_precision="bf16")
    assert isinstance(model, TinyMoE)
    assert math.isfinite(history.loss[-1])
    assert model.forward.__func__ is TinyMoE.forward
    assert model(tiny_data()[:2, :-1])[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0; should be at least 1"),
        ({"eval_every": 0}, "eval_every=0; should be at least 1"),
        ({"minutes": 0.0}, r"minutes=0\.0; should be more than 0"),
        ({"batch_size": 25}, "24 items do not fill one batch of 25"),
        ({"accumulate": 3}, "batch_size=4 cannot be shared by 1 processes × 3 micro-batches"),
        ({"resume": True}, "resume=True needs out"),
    ],
)
def test_impossible_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_run(**settings)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        fit(TinyMoE().requires_grad_(False), tiny_data(), steps=1, batch_size=2, progress=False)


def test_plain_progress_is_a_line_per_twentieth_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run(steps=40, progress=None, label="tiny")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 20
    assert lines[-1].startswith("tiny: step 40/40, loss ")
    assert "bits per byte" in lines[-1]
    assert "tokens/s, load max/mean " in lines[-1]


def test_bar_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run(progress=True, label="tiny", bits_label="bits per pixel")
    err = capsys.readouterr().err
    assert "tiny" in err
    assert "6/6" in err
    assert "bits per pixel" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _copy_of_start(model: nn.Module) -> nn.Module:
    """The weights that the other arm started from."""
    torch.manual_seed(0)
    fresh = TinyMoE(dropout=0.0).double()
    model.load_state_dict(fresh.state_dict())
    return model
