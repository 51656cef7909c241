"""Experts that cost next to nothing, and the rule by which a router counts the ones that give nothing.

A token sent here uses fewer matrix products than its neighbours: computation per token varies at a fixed k.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.nn.experts import check_routing
from coterie.nn.routers import Select
from coterie.nn.routing import Routing
from coterie.nn.score import wide


class ZeroCostExperts(nn.Module):
    """Constant, copy and zero experts, with ids in this order.

    A constant expert gives a₁ x + a₂ v with [a₁, a₂] = softmax(W x), a copy expert x, a zero expert 0. All of
    them together are one elementwise product and, for the constants, two products with their few rows:
    nothing is sorted, gathered or computed per expert.

    Args:
        dim: width D of a token and of the result.
        zero: how many zero experts.
        copy: how many copy experts.
        constant: how many constant experts; at least one of the three in all.

    Attributes: `kinds`, the kind of each expert by id.

    Returns (from forward, for x [T, D]): [T, D].

    Raises ValueError for negative counts, or none at all.

    Source: Jin et al. 2024 (MoE++, arXiv 2410.07348), zero-computation experts. v and W start at
    0.02 · N(0, 1).

    >>> bank = ZeroCostExperts(8, zero=1, copy=1, constant=2)
    >>> bank.kinds, bank(torch.randn(5, 8), Routing.dense(torch.rand(5, 4))).shape
    (('constant', 'constant', 'copy', 'zero'), torch.Size([5, 8]))
    """

    def __init__(self, dim: int, *, zero: int = 1, copy: int = 1, constant: int = 2) -> None:
        super().__init__()
        if min(zero, copy, constant) < 0 or zero + copy + constant < 1:
            raise ValueError(
                f"zero={zero}, copy={copy}, constant={constant}; none may be negative, one must be positive"
            )
        self.dim, self.zero, self.copy, self.constant = dim, zero, copy, constant
        self.num_experts = zero + copy + constant
        self.kinds = ("constant",) * constant + ("copy",) * copy + ("zero",) * zero
        self.mix_proj = nn.Parameter(0.02 * torch.randn(constant, 2, dim)) if constant else None  # W
        self.value = nn.Parameter(0.02 * torch.randn(constant, dim)) if constant else None  # v

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_routing(self.num_experts, routing)
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):  # the dtype that the banks of matrices answer in
            x_TD = x_TD.to(torch.get_autocast_dtype(device))
        if routing.mask is not None:  # padding may hold anything, and 0 · NaN is NaN
            x_TD = x_TD.masked_fill(~routing.mask.unsqueeze(1), 0)
        with torch.autocast(device, enabled=False):
            return self._combine(x_TD, routing.weights_TE).to(x_TD.dtype)

    def _combine(self, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
        """Σ weight · expert(x), regrouped: one factor per token for x, one per constant for v."""
        copied_T1 = weights_TE[:, self.constant : self.constant + self.copy].sum(1, keepdim=True)
        if self.mix_proj is None or self.value is None:
            return x_TD * copied_T1
        logits_TC2 = F.linear(x_TD, self.mix_proj.flatten(0, 1).to(x_TD)).view(len(x_TD), self.constant, 2)
        mixed_TC2 = wide(logits_TC2).softmax(-1) * weights_TE[:, : self.constant].unsqueeze(-1)
        copied_T1 = copied_T1 + mixed_TC2[..., 0].sum(1, keepdim=True)
        y_TD = x_TD * copied_T1
        return torch.addmm(y_TD, mixed_TC2[..., 1].to(y_TD), self.value.to(y_TD))


class MaskWeights(nn.Module):
    """Chosen experts of a given set keep their slot but get weight 0; the token's others share its sum.

    For zero experts: {FFN, zero} is then the FFN expert alone at full weight, and the slot still counts in
    the load. A token with no other expert gets weight 0 throughout.

    Args:
        select: chooses first.
        masked: bool [E], the experts whose weight is to be 0.

    Raises ValueError when `masked` is not over the router's experts.

    Source: Jin et al. 2024 (MoE++), as in the released code.

    >>> from coterie.nn import TopK
    >>> select = MaskWeights(TopK(2), torch.tensor([False, False, True]))
    >>> routing = select(torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 0.0]]))
    >>> routing.experts.tolist(), routing.weights.tolist()
    ([[2, 0], [0, 1]], [[0.0, 1.0], [0.5, 0.5]])
    """

    masked: Tensor

    def __init__(self, select: Select, masked: Tensor) -> None:
        super().__init__()
        self.select = select
        self.register_buffer("masked", masked.clone().bool())

    def forward(self, logits_TE: Tensor, *, mask: Tensor | None = None) -> Routing:
        if self.masked.shape != (logits_TE.shape[1],):
            raise ValueError(
                f"masked has shape {tuple(self.masked.shape)} but the router has {logits_TE.shape[1]} experts"
            )
        routing = self.select(logits_TE, mask=mask)
        masked_TK = self.masked[routing.experts.clamp(min=0)]
        kept_TK = routing.weights.masked_fill(masked_TK, 0)
        before_T1, after_T1 = routing.weights.sum(1, keepdim=True), kept_TK.sum(1, keepdim=True)
        # below 1e-18 the gradient's 1/after² would overflow; such a token counts as having no other expert
        after_T1 = after_T1.masked_fill(after_T1.abs() < 1e-18, torch.inf)
        return replace(routing, weights=kept_TK / after_T1 * before_T1)
