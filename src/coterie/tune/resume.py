"""Training to forget, kept and taken up again, so that it ends as an unbroken run does, bit by bit."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from coterie.tune.history import FORGET, Step
from coterie.tune.kept import Kept
from coterie.tune.trainable import Weights

_NAME = "training"


def keep_training(
    keep: Kept, run: Mapping[str, Any], weights: Weights, optimizer: Optimizer, history: Sequence[Step]
) -> None:
    """Keeps what is trained, its moments, and how it went.

    Args:
        keep: where.
        run: see `Kept.read`.
        weights: as they are after the last step of the history.
        optimizer: of them, in the same order.
        history: at least one step.
    """
    tensors = {}
    for i, parameter in enumerate(weights.parameters):
        # a copy: views of one bank share memory
        tensors[f"{i} weight"] = parameter.detach().clone()
        tensors |= {f"{i} {name}": moment for name, moment in optimizer.state[parameter].items()}
    keep.write(_NAME, run, tensors, [vars(step) for step in history])


@torch.no_grad()
def resume_training(
    keep: Kept,
    run: Mapping[str, Any],
    weights: Weights,
    optimizer: Optimizer,
    *,
    steps: int,
    stop_at: float | None,
) -> list[Step]:
    """Puts back what `keep_training` kept; returns its history, which is empty if nothing could be.

    Nothing is where nothing was kept, or where a run with these `steps` and `stop_at`, in which alone the two
    may differ, would have ended before.
    """
    found = keep.read(_NAME, run)
    if found is None:
        return []
    tensors, record = found
    history = [Step(**entry) for entry in record]
    ended = [
        s.step for s in history[:-1] if stop_at is not None and s.measured.get(FORGET, math.inf) <= stop_at
    ]
    last = history[-1].step
    if last > steps:
        keep.say(f"{last} steps were kept, and {steps} are asked for: training starts anew")
        return []
    if ended:
        keep.say(
            f"{last} steps were kept, and {stop_at:g} was reached at step {ended[0]}: training starts anew"
        )
        return []
    moments: dict[int, dict[str, Any]] = {i: {} for i in range(len(weights.parameters))}
    for key, tensor in tensors.items():
        number, name = key.split()
        if name == "weight":
            weights.parameters[int(number)].copy_(tensor)
        else:
            moments[int(number)][name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    weights.write()
    keep.say(f"going on after step {last}")
    return history
