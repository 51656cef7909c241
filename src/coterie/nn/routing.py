"""`Routing`: which token went to which expert with what weight. Every room speaks it.

Letters, here and in all of `nn`: T tokens, E experts, K slots per token, D model width, F hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from coterie.kernels import Dispatch, sort_by_expert

T = TypeVar("T")


@dataclass(eq=False)
class Routing:
    """A routing decision for T tokens over E experts.

    Args:
        experts: [T, K] int64 expert of each slot, -1 where a slot is unused.
        weights: [T, K] combine weights, 0 where unused; carries the router's gradient. Any sign, any sum.
        scores: [T, E] gate scores before selection (softmax, sigmoid, …), for losses and plots.
        logits: [T, E] what the scores were computed from.
        num_experts: E.
        mask: [T] bool, False for padding; None when every token counts. A masked token uses no slot and
            enters no loss and no statistic.
        chosen_E: [E] slots each expert was given before any were dropped over capacity; None if none were.
        choice_probability: [T, E] probability that a token's top-k holds an expert under fresh noise
            (noisy top-k only); what Shazeer's load loss differentiates.
        paths: [T, J, E] probability that each of J trees sends the token to each of its leaves (tree routers
            only); what the path entropy differentiates.

    Treat it as immutable: what is derived from it is computed once and kept. (Not a frozen dataclass, which
    torch.compile cannot return.) Nothing is checked on construction, which sits in the hot path;
    `validate()` checks everything.

    >>> r = Routing.dense(torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    >>> r.load.tolist(), [round(v, 1) for v in r.importance.tolist()]
    ([2, 2], [1.1, 0.9])
    """

    experts: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor
    num_experts: int
    mask: Tensor | None = None
    chosen_E: Tensor | None = None
    choice_probability: Tensor | None = None
    paths: Tensor | None = None
    _derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def dense(cls, scores: Tensor, logits: Tensor | None = None, mask: Tensor | None = None) -> "Routing":
        """Soft mixing: every token uses every expert, weighted by its score (K = E)."""
        num_experts = scores.shape[1]
        experts = torch.arange(num_experts, device=scores.device).expand(scores.shape[0], -1)
        routing = cls(experts, scores, scores, scores if logits is None else logits, num_experts, mask)
        return routing if mask is None else routing.keep(mask.unsqueeze(1).expand_as(experts))

    @property
    def used(self) -> Tensor:
        """[T, K] bool: which slots hold an expert."""
        return self.experts >= 0

    @property
    def slots_per_token(self) -> Tensor:
        """[T] int64: experts each token goes to."""
        return self.used.sum(1)

    @property
    def load(self) -> Tensor:
        """[E] int64: tokens each expert receives."""
        return self._once("load", lambda: self._sum_by_expert(torch.ones_like(self.experts)))

    @property
    def importance(self) -> Tensor:
        """[E]: summed combine weight of each expert (Shazeer et al. 2017, eq. 6); differentiable."""
        return self._once("importance", lambda: self._sum_by_expert(self.weights))

    @property
    def dropped(self) -> Tensor:
        """[E] int64: slots each expert lost to its capacity."""
        return torch.zeros_like(self.load) if self.chosen_E is None else self.chosen_E - self.load

    @property
    def num_tokens(self) -> Tensor:
        """Tokens that count (not padding), as a scalar tensor."""
        if self.mask is None:
            return torch.tensor(self.experts.shape[0], device=self.experts.device)
        return self.mask.sum()

    @property
    def dispatch(self) -> Dispatch:
        """The slots sorted by expert, computed once and shared by every bank of the layer."""
        return self._once("dispatch", lambda: sort_by_expert(self.experts, self.num_experts))

    @property
    def weights_TE(self) -> Tensor:
        """[T, E]: combine weights spread over all experts, 0 where an expert is not used."""
        columns_TK = self.experts.where(self.used, self.num_experts)
        spread = self.weights.new_zeros(self.experts.shape[0], self.num_experts + 1)
        return spread.scatter_add(1, columns_TK, self.weights)[:, :-1]

    @property
    def used_TE(self) -> Tensor:
        """[T, E] bool: which token uses which expert."""
        columns_TK = self.experts.where(self.used, self.num_experts)
        spread = torch.zeros(
            self.experts.shape[0], self.num_experts + 1, dtype=torch.bool, device=self.experts.device
        )
        return spread.scatter(1, columns_TK, True)[:, :-1]

    def keep(self, slots_TK: Tensor) -> "Routing":
        """The same routing with every slot outside the bool mask `slots_TK` unused."""
        return replace(
            self,
            experts=self.experts.masked_fill(~slots_TK, -1),
            weights=self.weights.masked_fill(~slots_TK, 0),
        )

    def drop_over_capacity(
        self, capacity_factor: float | Tensor, *, by: Literal["position", "weight"] = "position"
    ) -> "Routing":
        """Drops the slots that exceed each expert's capacity.

        Capacity is ceil(capacity_factor · used slots / E) tokens per expert.

        Args:
            capacity_factor: one number, or a tensor [E] for a capacity per expert; at least 0.
            by: who keeps a place. "position": all first slots in token order, then all second slots
                (GShard, algorithm 1); "weight": the largest combine weights (V-MoE, batch priority).

        Source: Lepikhin et al. 2020 (GShard); Riquelme et al. 2021 (V-MoE), section 4.1.

        >>> r = Routing.dense(torch.tensor([[0.9, 0.1], [0.2, 0.8]])).drop_over_capacity(0.5)
        >>> r.load.tolist(), r.dropped.tolist()
        ([1, 1], [1, 1])
        """
        factor_E = torch.as_tensor(capacity_factor, dtype=torch.float64, device=self.experts.device)
        if factor_E.dim() > 1 or (factor_E.dim() == 1 and len(factor_E) != self.num_experts):
            raise ValueError(
                f"capacity_factor has shape {tuple(factor_E.shape)}; "
                f"give one number or one for each of {self.num_experts} experts"
            )
        if by not in ("position", "weight"):
            raise ValueError(f'by={by!r}; use "position" or "weight"')
        capacity_E = (factor_E * self.load.sum() / self.num_experts).ceil().long().expand(self.num_experts)
        slots, tokens = self.experts.shape[1], self.experts.shape[0]
        experts_N = self.experts.t().reshape(-1)  # slot-major: first choices before second ones
        if by == "weight":
            priority = torch.sort(self.weights.detach().t().reshape(-1), descending=True, stable=True).indices
        else:
            priority = torch.arange(experts_N.numel(), device=experts_N.device)
        ordered = experts_N[priority]
        grouped = torch.sort(ordered, stable=True)
        first = torch.searchsorted(grouped.values, grouped.values, right=False)
        rank = torch.empty_like(ordered)
        rank[priority[grouped.indices]] = torch.arange(len(ordered), device=ordered.device) - first
        capacity_N = capacity_E[experts_N.clamp(min=0)]
        keep_TK = (rank < capacity_N).view(slots, tokens).t() & self.used
        return replace(self.keep(keep_TK), chosen_E=self.load if self.chosen_E is None else self.chosen_E)

    def narrow(self, first: int, count: int) -> "Routing":
        """The part that concerns experts first … first + count - 1, renumbered from 0."""
        inside_TK = (self.experts >= first) & (self.experts < first + count)
        part = self.keep(inside_TK)
        columns = slice(first, first + count)
        chosen, probability = self.chosen_E, self.choice_probability
        return replace(
            part,
            experts=part.experts.where(~inside_TK, part.experts - first),
            scores=self.scores[:, columns],
            logits=self.logits[:, columns],
            num_experts=count,
            chosen_E=None if chosen is None else chosen[columns],
            choice_probability=None if probability is None else probability[:, columns],
        )

    def repeat(self, times: int) -> "Routing":
        """Every token's decision `times` times in a row: one per sequence becomes one per token."""
        routing = replace(self, chosen_E=None if self.chosen_E is None else self.chosen_E * times)
        return routing._map(lambda t: t.repeat_interleave(times, 0) if t is not routing.chosen_E else t)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Routing":
        """Moves to a device; dtypes stay as they are."""
        return self._map(lambda t: t.to(device=device, non_blocking=non_blocking))

    def detach(self) -> "Routing":
        """The same decision without its gradient."""
        return self._map(Tensor.detach)

    def validate(self) -> "Routing":
        """Returns itself, or raises ValueError saying which invariant is broken. Synchronises."""
        tokens, slots = self.experts.shape
        shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {
            "weights": (self.weights, (tokens, slots)),
            "scores": (self.scores, (tokens, self.num_experts)),
            "logits": (self.logits, (tokens, self.num_experts)),
        }
        if self.mask is not None:
            shapes["mask"] = (self.mask, (tokens,))
        for name, (tensor, shape) in shapes.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; should be {shape}")
        if self.experts.dtype != torch.int64:
            raise ValueError(f"experts are {self.experts.dtype}; should be torch.int64")
        if self.experts.numel() and not (
            int(self.experts.min()) >= -1 and int(self.experts.max()) < self.num_experts
        ):
            raise ValueError(
                f"experts run from {int(self.experts.min())} to {int(self.experts.max())}; "
                f"should lie in -1 … {self.num_experts - 1}"
            )
        if bool((self.weights[~self.used] != 0).any()):
            raise ValueError("an unused slot has a weight; should be 0")
        if not bool(self.weights.isfinite().all()):
            raise ValueError("weights hold NaN or infinity; should be finite")
        if int(self.used_TE.sum()) != int(self.used.sum()):
            raise ValueError("a token names one expert in two slots; should be distinct")
        if self.mask is not None and bool(self.used[~self.mask].any()):
            raise ValueError("a padding token uses a slot; should use none")
        return self

    def _once(self, name: str, compute: Callable[[], T]) -> T:
        # not functools.cached_property, whose lock (Python ≤ 3.11) torch.compile cannot trace
        if name not in self._derived:
            self._derived[name] = compute()
        derived: T = self._derived[name]
        return derived

    def _sum_by_expert(self, values_TK: Tensor) -> Tensor:
        columns_N = self.experts.where(self.used, self.num_experts).reshape(-1)
        total = values_TK.new_zeros(self.num_experts + 1)
        return total.scatter_add(0, columns_N, values_TK.reshape(-1))[:-1]

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "Routing":
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        tensors: dict[str, Any] = {k: fn(v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)
