"""Sums over micro-batches and processes: what one step, or one evaluation, amounts to."""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from coterie.train.losses import LossOutput


@dataclass
class Totals:
    """What `Sums.totals` returns.

    Args:
        loss, cross_entropy: means over tokens.
        tokens: how many, over all processes.
        metrics: means over tokens.
        loads: per MoE layer int64 [E] on the CPU, tokens each expert received.
        votes: for each flag, how many processes raised it.
    """

    loss: float
    cross_entropy: float
    tokens: int
    metrics: dict[str, float]
    loads: list[Tensor]
    votes: list[int]

    @property
    def imbalance(self) -> float | None:
        """Load of the busiest expert over the mean load, in the worst layer; None without experts."""
        if not self.loads:
            return None
        return max((load_E.max() / load_E.double().mean().clamp(min=1e-9)).item() for load_E in self.loads)


class Sums:
    """Adds up loss outputs as one vector, so that processes need a single small all-reduce.

    >>> sums = Sums()
    >>> sums.add(LossOutput(torch.tensor(2.0), torch.tensor(1.0), tokens=3))
    >>> sums.add(LossOutput(torch.tensor(6.0), torch.tensor(1.0), tokens=1))
    >>> totals = sums.totals(votes=[True])
    >>> totals.loss, totals.tokens, totals.votes
    (3.0, 4, [1])
    """

    def __init__(self) -> None:
        self._vector: Tensor | None = None
        self._metrics: list[str] = []
        self._experts: list[int] = []

    def add(self, output: LossOutput, weight: int = 1) -> None:
        """Adds one micro-batch, `weight` times; with 0 it only tells the shape of the sums."""
        # float64 adds counts and losses without rounding; MPS has none
        dtype = torch.float32 if output.loss.device.type == "mps" else torch.float64
        scalars = (output.loss, output.cross_entropy, *output.metrics.values())
        means = torch.stack([scalar.detach().to(dtype) for scalar in scalars])
        loads = [routing.load.to(dtype) for routing in output.routings]
        vector = torch.cat([means.new_tensor([output.tokens]), means * output.tokens, *loads])
        vector = vector * weight if weight else torch.zeros_like(vector)  # 0 · NaN would be NaN
        self._metrics = list(output.metrics)
        self._experts = [len(load_E) for load_E in loads]
        self._vector = vector if self._vector is None else self._vector + vector

    def totals(self, votes: list[bool] | None = None) -> Totals:
        """The totals over all processes; every process must call it, with as many votes."""
        if self._vector is None:
            raise ValueError("nothing was added up; add at least one loss output")
        votes = votes or []
        vector = torch.cat([self._vector, self._vector.new_tensor([float(vote) for vote in votes])])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(vector)
        numbers = vector.cpu()
        tokens, means = int(numbers[0]), len(self._metrics) + 2
        loss, cross_entropy, *metrics = (numbers[1 : 1 + means] / max(tokens, 1)).tolist()
        loads = numbers[1 + means : len(numbers) - len(votes)].round().long()
        return Totals(
            loss=loss,
            cross_entropy=cross_entropy,
            tokens=tokens,
            metrics=dict(zip(self._metrics, metrics, strict=True)),
            loads=list(torch.split(loads, self._experts)) if self._experts else [],
            votes=[int(v) for v in numbers[len(numbers) - len(votes) :]],
        )
