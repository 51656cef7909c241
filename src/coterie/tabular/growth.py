"""How a mixture of linear experts learns from chunk to chunk, and where a new expert comes from."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.nn import hold_experts
from coterie.tabular.linear_mixture import (
    LinearMixture,
    Mix,
    Mixed,
    add_expert,
    merge_experts,
    most_alike,
    remove_expert,
)

_REMEMBERED = 3  # chunks over which the least used expert is found


class GrowingMixture:
    """A mixture with its optimiser, whose moments follow experts that come and go.

    Args:
        dim: D.
        num_experts: E to begin with.
        mix: "prob" or "logit".
        learning_rate: of Adam.
        seed: everything random follows from it and from `chunks`, so that a loaded mixture goes on as it
            would have; torch's own generator stays as it is.

    `shares` is the mean gate share of each expert in each of the last chunks; None before it was there.
    """

    def __init__(self, dim: int, num_experts: int, mix: Mix, *, learning_rate: float, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = LinearMixture(dim, num_experts, mix)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate)
        self.learning_rate, self.seed, self.chunks = learning_rate, seed, 0
        self.shares: list[list[float | None]] = []

    def train(
        self, x_TD: Tensor, loss: Callable[[Mixed], Tensor], *, steps: int, l2: float, only_newest: bool
    ) -> None:
        """Full-batch steps on a chunk. A step is shorter than the general training loop's upkeep.

        Args:
            x_TD: the chunk.
            loss: of what the mixture makes of it.
            steps: how many.
            l2: weight of the squares of the experts' and the gate's weights.
            only_newest: all experts but the last stay bit for bit as they are; the gate learns.
        """
        held = range(self.model.num_experts - 1) if only_newest else ()
        gate, experts = self.model.banks
        with hold_experts(experts, held, self.optimizer):
            for _ in range(steps):
                self.optimizer.zero_grad()
                decay = experts.weight.square().sum() + gate.weight.square().sum()
                torch.autograd.backward(loss(self.model(x_TD)) + l2 * decay)
                self.optimizer.step()

    def remember(self, x_TD: Tensor) -> None:
        """Notes each expert's share of the gate on a chunk that is done with."""
        with torch.no_grad():
            shares = self.model.router(x_TD).weights.mean(0).tolist()
        self.shares = [*self.shares, shares][-_REMEMBERED:]
        self.chunks += 1

    def grow(
        self, x_TD: Tensor, *, max_experts: int, merge_above: float | None, start: "NewExpert"
    ) -> dict[str, Any]:
        """Adds an expert; experts that are alike are merged before, and without room the least used goes.

        Args:
            x_TD: the chunk for which it is added.
            max_experts: at most this many afterwards.
            merge_above: cosine of weights above which two experts become one first; None for never.
            start: weight and bias that the new expert starts from.

        Returns: {"merged": pairs of experts, "removed": expert or None}.
        """
        merged: list[list[int]] = []
        while merge_above is not None and self.model.num_experts > 1:
            pair, cosine = most_alike(self.model)
            if cosine <= merge_above:
                break
            merge_experts(self.model, pair, x_TD, self.optimizer)
            one, other = pair
            for shares in self.shares:
                both = [share for share in (shares[one], shares.pop(other)) if share is not None]
                shares[one] = sum(both) if both else None
            merged.append([one, other])
        removed = None
        if self.model.num_experts >= max_experts:
            removed = self.least_used()
            remove_expert(self.model, removed, self.optimizer)
            for shares in self.shares:
                del shares[removed]
        add_expert(self.model, x_TD, *start, self.optimizer)
        for shares in self.shares:
            shares.append(None)
        return {"merged": merged, "removed": removed}

    def least_used(self) -> int:
        """The expert with the smallest mean share over the last chunks that it was there for."""
        columns = [[s for s in column if s is not None] for column in zip(*self.shares, strict=True)]
        means = [sum(column) / len(column) for column in columns]
        return means.index(min(means))

    def small_expert(self) -> "NewExpert":
        """Small random weights."""
        generator = torch.Generator().manual_seed(self.seed + 1 + self.chunks)
        dim = self.model.experts.dim
        return 0.1 * torch.randn(dim, generator=generator, dtype=torch.float64), 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Weights, and the optimiser's moments."""
        moments = self.optimizer.state_dict()["state"]
        return {
            **{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()},
            **{f"adam.{i}.{key}": value for i, state in moments.items() for key, value in state.items()},
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `tensors` gave."""
        own = {
            name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")
        }
        self.model.load_state_dict(own)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


NewExpert = tuple[Tensor, float]  # weight [D], bias


def fit_expert(
    start: NewExpert, x_TD: Tensor, y_T: Tensor, *, steps: int, learning_rate: float, l2: float
) -> NewExpert:
    """A logistic regression fitted to some rows, as a new expert to begin with."""
    weight_D, bias = start[0].clone().requires_grad_(), torch.tensor(start[1]).double().requires_grad_()
    optimizer = torch.optim.Adam([weight_D, bias], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        error = F.binary_cross_entropy_with_logits(x_TD @ weight_D + bias, y_T)
        torch.autograd.backward(error + l2 * weight_D.square().sum())
        optimizer.step()
    return weight_D.detach(), float(bias.detach())


def unfair_errors(y_T: Tensor, decided_T: Tensor, group_T: Tensor) -> Tensor:
    """Which rows carry the gap between groups, [T] bool.

    False negatives of the group with the fewest positive decisions, and false positives of the others; none
    where there are fewer than two groups.

    >>> y, decided = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> unfair_errors(y, decided, torch.tensor([0, 1, 0, 1])).tolist()
    [True, False, False, True]
    """
    groups = torch.unique(group_T[group_T >= 0])
    if len(groups) < 2:
        return torch.zeros_like(group_T, dtype=torch.bool)
    rates = torch.stack([decided_T[group_T == group].mean() for group in groups])
    behind_T = group_T == groups[rates.argmin()]
    carries_T: Tensor = torch.where(behind_T, y_T > decided_T, (y_T < decided_T) & (group_T >= 0))
    return carries_T
