"""Routers around a router: one decision for a whole sequence, slots dropped, a capacity kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coterie.nn.routers import AnyRouter
from coterie.nn.routing import Routing
from coterie.nn.score import wide


class SequenceRouter(nn.Module):
    """One decision per sequence (or task), from its mean token, given to all its tokens.

    Args:
        router: decides on [B, D] means.

    Reads `shape` = (B, S) from the context; padding is left out of the mean.

    >>> from coterie.nn import LinearScore, Router, TopK
    >>> router = SequenceRouter(Router(LinearScore(16, 8), TopK(1)))
    >>> router(torch.randn(6, 16), shape=(2, 3)).experts.view(2, 3).unique(dim=1).shape
    torch.Size([2, 1])
    """

    def __init__(self, router: AnyRouter) -> None:
        super().__init__()
        self.router = router
        self.num_experts = router.num_experts

    def forward(
        self,
        x_TD: Tensor,
        *,
        shape: tuple[int, ...] | None = None,
        mask: Tensor | None = None,
        **context: Any,
    ) -> Routing:
        if shape is None or len(shape) != 2:
            raise ValueError(f"SequenceRouter needs shape=(B, S) in the context; found {shape}")
        batch, length = shape
        x_BSD = wide(x_TD).view(batch, length, -1)
        counted_BS1 = x_BSD.new_ones(batch, length, 1) if mask is None else mask.view(batch, length, 1)
        total_BD = torch.where(counted_BS1 > 0, x_BSD, 0).sum(1)
        decision = self.router(total_BD / counted_BS1.sum(1).clamp(min=1), **context)
        routing = replace(decision.repeat(length), mask=mask)
        return routing if mask is None else routing.keep(mask.unsqueeze(1).expand_as(routing.experts))


class MaskSlots(nn.Module):
    """Drops some of the chosen slots after selection.

    Args:
        router: chooses first.
        keep: (x_TD, routing) → [T, K] mask, bool or float; a slot stays used where it is > 0, and a float
            mask multiplies the weight, so that a straight-through mask can learn.
        renormalize: rescale each token's weights to the sum they had.

    >>> from coterie.nn import RandomRouter
    >>> first_only = lambda x, routing: torch.tensor([True, False]).expand_as(routing.experts)
    >>> MaskSlots(RandomRouter(8, k=2), first_only)(torch.zeros(3, 16)).slots_per_token.tolist()
    [1, 1, 1]
    """

    def __init__(
        self, router: AnyRouter, keep: Callable[[Tensor, Routing], Tensor], *, renormalize: bool = False
    ) -> None:
        super().__init__()
        self.router, self.keep, self.renormalize = router, keep, renormalize
        self.num_experts = router.num_experts

    def forward(self, x_TD: Tensor, **context: Any) -> Routing:
        routing = self.router(x_TD, **context)
        mask_TK = self.keep(x_TD, routing)
        weights_TK = routing.weights * mask_TK
        if self.renormalize:
            before, after = routing.weights.sum(1, keepdim=True), weights_TK.sum(1, keepdim=True)
            weights_TK = weights_TK * (before / torch.where(after == 0, 1, after))
        return replace(routing, weights=weights_TK).keep(mask_TK > 0)


class LimitCapacity(nn.Module):
    """Lets each expert take at most its capacity of tokens; what exceeds it is dropped.

    Args:
        router: chooses first.
        capacity_factor: capacity in shares of the mean load; a tensor [E] for one per expert.
        by: who keeps a place, "position" or "weight"; see `Routing.drop_over_capacity`.
        training_only: in evaluation mode every expert takes all its tokens.

    >>> from coterie.nn import RandomRouter
    >>> LimitCapacity(RandomRouter(4, k=2), 1.0)(torch.zeros(6, 16)).load.max() <= 3
    tensor(True)
    """

    def __init__(
        self,
        router: AnyRouter,
        capacity_factor: float | Tensor,
        *,
        by: Literal["position", "weight"] = "position",
        training_only: bool = False,
    ) -> None:
        super().__init__()
        self.router, self.by, self.training_only = router, by, training_only
        self.num_experts = router.num_experts
        self.capacity_factor = capacity_factor  # no buffer: model.to(bfloat16) would round it

    def forward(self, x_TD: Tensor, **context: Any) -> Routing:
        routing = self.router(x_TD, **context)
        if self.training_only and not self.training:
            return routing
        return routing.drop_over_capacity(self.capacity_factor, by=self.by)
