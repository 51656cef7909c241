"""The training loop: one function, on Hugging Face Accelerate."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from coterie.data import ShuffledBatches
from coterie.train.callbacks import Callback, Run
from coterie.train.checkpoint import Checkpoints, run_identity
from coterie.train.evaluate import evaluate
from coterie.train.history import History
from coterie.train.interrupt import FinishOnInterrupt
from coterie.train.losses import LossFn, language_model_loss
from coterie.train.optimizer import adamw
from coterie.train.progress import training_progress
from coterie.train.schedule import cosine_with_warmup
from coterie.train.totals import Sums, Totals

if TYPE_CHECKING:
    from accelerate import Accelerator


def fit(
    model: nn.Module,
    data: Dataset[Any],
    *,
    steps: int,
    batch_size: int,
    loss: LossFn | None = None,
    lr: float = 1e-3,
    min_lr_ratio: float = 0.1,
    warmup_steps: int | None = None,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    grad_clip: float | None = 1.0,
    accumulate: int = 1,
    eval_data: Dataset[Any] | None = None,
    eval_every: int | None = None,
    eval_batches: int | None = None,
    minutes: float | None = None,
    callbacks: Sequence[Callback] = (),
    out: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    mixed_precision: str | None = None,
    label: str = "",
    bits_label: str = "bits per byte",
) -> History:
    """Trains a model in place, with AdamW and a cosine schedule.

    The same call runs in one process or, under `accelerate launch`, in many; together they see exactly the
    batches that one would see. Python's, NumPy's and torch's random generators are seeded with `seed`.

    Ctrl-C finishes the step (and an evaluation or checkpoint under way), saves if there is an `out`, and
    returns; a second one stops at once.

    Args:
        model: moved to Accelerate's device.
        data: map-style, with a length; items are collated as a DataLoader does.
        steps: optimizer steps of the whole run.
        batch_size: items per optimizer step, over all processes and micro-batches.
        loss: (model, batch) → LossOutput; None for `language_model_loss()`.
        lr: peak learning rate.
        min_lr_ratio: share of it that is left at the last step.
        warmup_steps: steps of linear rise; None for a twentieth of `steps`.
        weight_decay: of matrices only, see `weight_decay_groups`.
        betas: of AdamW.
        grad_clip: largest norm of the gradient; None for no limit.
        accumulate: micro-batches per step. A loss that is a mean over items comes out as on the joined
            batch; balance losses see one micro-batch at a time.
        eval_data: evaluated after the last step, and every `eval_every` steps.
        eval_every: None for the end only.
        eval_batches: batches of `batch_size` per evaluation; None for all of `eval_data`.
        minutes: wall-time budget, resumed runs' earlier time included. When it is spent, the run evaluates,
            saves and returns.
        callbacks: called after each step, in order.
        out: folder for checkpoints, one at the end and one every `save_every` steps; None for none.
        resume: go on from the newest checkpoint in `out`; from scratch, with a note, if there is none. On a
            CPU the result is bit for bit that of an unbroken run. `steps` and learning rates may change.
        seed: of batch order and random generators.
        progress: True for a bar, False for silence, None for a bar on a terminal and plain lines elsewhere.
        mixed_precision: "bf16" or "fp16"; None for what `accelerate` is configured to. Accelerate fixes it
            for the process: a later `fit` with another value is refused.
        label: name of the run in progress and history.
        bits_label: what progress calls cross-entropy / ln 2; right as it is for byte tokens.

    Returns: the history; `interrupted` and `stopped_early` say why it is shorter than `steps`.

    Raises:
        ValueError: an argument out of range; too little data for one batch; `out` holds a run and `resume`
            is False, or a run of another model, batch size, seed, data length or number of processes; the
            loss or the gradient became NaN or infinite (before they reach the weights).

    >>> from coterie.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(257, dim=16, layers=1, heads=1, kv_heads=1, head_dim=16, hidden=32))
    >>> history = fit(model, torch.randint(257, (8, 17)), steps=3, batch_size=4, progress=False)
    >>> history.step, history.tokens
    ([1, 2, 3], [64, 64, 64])
    """
    from accelerate import Accelerator  # half a second, which `train_epochs` does not need
    from accelerate.utils import set_seed

    _check(steps, batch_size, accumulate, eval_every, save_every, minutes)
    begun, loss, training = time.perf_counter(), loss or language_model_loss(), model.training
    warmup = steps // 20 if warmup_steps is None else warmup_steps
    accelerator = Accelerator(mixed_precision=mixed_precision)
    items, world = len(data), accelerator.num_processes  # type: ignore[arg-type]
    place = {"rank": accelerator.process_index, "world": world, "accumulate": accumulate}
    batches = ShuffledBatches(items, batch_size, seed, **place)
    identity = run_identity(model, batch_size=batch_size, seed=seed, items=items, processes=world)
    checkpoints = Checkpoints(accelerator, None if out is None else Path(out), identity)
    checkpoints.check(resume)
    set_seed(seed, device_specific=True)
    adam = adamw(model, lr=lr, weight_decay=weight_decay, betas=betas, device=accelerator.device)
    wrapped, optimizer = accelerator.prepare(model, adam)
    history = _begin(checkpoints, resume, steps, label, accelerator.is_main_process)
    batches.start_step, before = history.steps, history.wall_seconds
    stream = _micro_batches(data, batches, accelerator.device)
    show = progress if accelerator.is_main_process else False
    progress_bar = training_progress(history, steps, show=show, bits_label=bits_label)

    def out_of_time() -> bool:
        history.wall_seconds = before + time.perf_counter() - begun
        return minutes is not None and history.wall_seconds >= 60 * minutes

    history.stopped_early = history.steps < steps and minutes is not None and before >= 60 * minutes
    wrapped.train()
    try:
        with FinishOnInterrupt() as interrupt, progress_bar as show_step:
            while history.steps < steps and not (history.interrupted or history.stopped_early):
                start = time.perf_counter()
                rate = lr * cosine_with_warmup(history.steps, steps, warmup=warmup, min_ratio=min_lr_ratio)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                sums = _backward(accelerator, wrapped, loss, stream, accumulate)
                totals = sums.totals(votes=[interrupt.requested, out_of_time()])
                _clip(accelerator, wrapped, grad_clip, totals.loss, history.steps + 1, checkpoints)
                optimizer.step()
                optimizer.zero_grad()
                _record(history, totals, rate, time.perf_counter() - start)
                for callback in callbacks:
                    callback.on_step(_run(model, adam, history.steps, steps, totals))
                show_step()

                done = history.steps == steps
                history.interrupted, history.stopped_early = (bool(v) and not done for v in totals.votes)
                ended = done or history.stopped_early
                if eval_data is not None and (ended or _due(eval_every, history.steps)):
                    result = evaluate(wrapped, eval_data, loss, batch_size, eval_batches)
                    history.evals.append({"step": history.steps, **result})
                if ended or history.interrupted or _due(save_every, history.steps):
                    out_of_time()
                    checkpoints.save(history)
    finally:
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        model.train(training)
    return history


def _check(
    steps: int,
    batch_size: int,
    accumulate: int,
    eval_every: int | None,
    save_every: int | None,
    minutes: float | None,
) -> None:
    for name, value in {
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "eval_every": eval_every,
        "save_every": save_every,
    }.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; should be at least 1")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes={minutes}; should be more than 0")


def _begin(checkpoints: Checkpoints, resume: bool, steps: int, label: str, main: bool) -> History:
    """The history to go on with: a resumed one, or an empty one."""
    history = checkpoints.load() if resume else None
    if history is None:
        if resume and main:
            print(f"no checkpoint in {checkpoints.out}; starting from scratch", file=sys.stderr)
        return History(label=label)
    if history.steps > steps:
        raise ValueError(f"{checkpoints.newest} is beyond steps={steps}; ask for at least {history.steps}")
    if main:
        print(f"resuming from {checkpoints.newest}", file=sys.stderr)
    return history


def _micro_batches(data: Dataset[Any], batches: ShuffledBatches, device: torch.device) -> Iterator[Any]:
    from accelerate.utils import send_to_device

    # a generator of its own: DataLoader would draw from torch's and shift a resumed run's random numbers
    loader = DataLoader(data, batch_sampler=batches, generator=torch.Generator())
    for batch in loader:
        yield send_to_device(batch, device)


def _backward(
    accelerator: "Accelerator", model: nn.Module, loss: LossFn, stream: Iterator[Any], accumulate: int
) -> Sums:
    """Gradients of one step: the mean over its micro-batches, reduced over processes with the last one."""
    sums = Sums()
    for i in range(accumulate):
        last = i == accumulate - 1
        with nullcontext() if last else accelerator.no_sync(model):
            output = loss(model, next(stream))
            accelerator.backward(output.loss / accumulate)
        sums.add(output)
    return sums


def _clip(
    accelerator: "Accelerator",
    model: nn.Module,
    grad_clip: float | None,
    loss: float,
    step: int,
    checkpoints: Checkpoints,
) -> None:
    """Clips the gradient; ValueError when it, or the loss, is not finite."""
    limit = math.inf if grad_clip is None else grad_clip
    norm = float(accelerator.clip_grad_norm_(model.parameters(), limit))
    # with fp16 an overflowing gradient is normal: the scaler skips the step and lowers its scale
    if math.isfinite(loss) and (math.isfinite(norm) or accelerator.scaler is not None):
        return
    saved = checkpoints.newest
    where = "no checkpoint was saved" if saved is None else f"the last good checkpoint is {saved}"
    raise ValueError(
        f"step {step}: loss {loss}, gradient norm {norm}; {where}. "
        "Lower lr or grad_clip, or look for NaN in the data"
    )


def _record(history: History, totals: Totals, lr: float, seconds: float) -> None:
    history.step.append(history.steps + 1)
    history.loss.append(totals.loss)
    history.cross_entropy.append(totals.cross_entropy)
    history.lr.append(lr)
    history.tokens.append(totals.tokens)
    history.seconds.append(seconds)
    history.imbalance.append(totals.imbalance)


def _run(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, steps: int, totals: Totals) -> Run:
    metrics = {**totals.metrics, "cross_entropy": totals.cross_entropy}
    return Run(model, optimizer, step, steps, totals.loss, metrics, totals.loads)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
