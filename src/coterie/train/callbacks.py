"""What may happen after every optimizer step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from coterie.nn import LearnedPermutation, TopK, balance


@dataclass
class Run:
    """The state of a training run that callbacks see, and may change through `model` and `optimizer`.

    Args:
        model: the model itself, without wrappers.
        optimizer: its optimizer; learning rates are set anew before each step.
        step: steps done, this one included.
        steps: steps of the whole run.
        loss: of this step's global batch.
        metrics: the loss function's metrics of this step, and "cross_entropy".
        loads: per MoE layer int64 [E] on the CPU: tokens each expert received, over all micro-batches and
            processes.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    steps: int
    loss: float
    metrics: dict[str, float]
    loads: list[Tensor]


class Callback(Protocol):
    """Called by every process after each optimizer step. State it must not lose on resuming belongs in
    the model, as a buffer, or follows from `run.step`."""

    def on_step(self, run: Run) -> None: ...


class Every:
    """Calls something with the model and the step after every n-th step, such as `StabilityTracker.update`.

    Args:
        steps: n.
        call: takes the model and the number of steps done.

    Raises:
        ValueError: steps below 1.
    """

    def __init__(self, steps: int, call: Callable[[nn.Module, int], None]) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps}; should be at least 1")
        self.steps, self.call = steps, call

    def on_step(self, run: Run) -> None:
        if run.step % self.steps == 0:
            self.call(run.model, run.step)


class LossFreeBias:
    """Loss-free balancing: after each step, moves the selection biases towards balanced load.

    For models whose every MoE layer selects with `TopK(..., bias=...)`, in the order of their routings.

    Args:
        rate: size of the step.

    Raises (on the first step):
        ValueError: selections with a bias and routed layers differ in number, or in experts.

    Source: Wang et al. 2024 (loss-free balancing), algorithm 1.
    """

    def __init__(self, rate: float = 1e-3) -> None:
        self.rate = rate

    def on_step(self, run: Run) -> None:
        biases = [m.bias for m in run.model.modules() if isinstance(m, TopK) and m.bias is not None]
        if [len(bias_E) for bias_E in biases] != [len(load_E) for load_E in run.loads]:
            raise ValueError(
                f"LossFreeBias found selection biases over {[len(b) for b in biases]} experts but routed "
                f"layers over {[len(load_E) for load_E in run.loads]}; give every layer TopK(bias=zeros(E))"
            )
        for bias_E, load_E in zip(biases, run.loads, strict=True):
            balance.loss_free_update(bias_E, load_E, self.rate)


class PermutationSearch:
    """Permutation-based local search: sharpens every `LearnedPermutation` of a model, then ends the search.

    Over the first `steps` steps the permutations go through their temperatures; after the last of these they
    are rounded and learn no more. Evaluation uses the rounded permutation throughout.

    Args:
        steps: of the search; a tenth of the run, or less, in the paper.

    Raises:
        ValueError: steps < 1; or, on the first step, a model without `LearnedPermutation`.

    Source: Ibrahim et al. 2023 (COMET), section 4.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps}; a search takes at least 1")
        self.steps = steps

    def on_step(self, run: Run) -> None:
        permutations = [m for m in run.model.modules() if isinstance(m, LearnedPermutation)]
        if not permutations:
            raise ValueError("PermutationSearch found no LearnedPermutation; wrap routers in PermuteLabels")
        for permutation in permutations:
            permutation.progress.fill_(min(run.step / self.steps, 1))
            if run.step >= self.steps:
                permutation.harden()
