"""The second step of a router: which experts get the token, with what weight? Logits in, `Routing` out.

A selection is any module with `forward(logits_TE, *, mask=None) -> Routing`; mask [T] is False for
padding. An expert whose logit is -inf is never chosen.

Gates turn logits into scores: "softmax", "sigmoid", or "identity" (signed, unnormalised weights).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from coterie.nn.routing import Routing

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "identity": lambda logits: logits,
}


class TopK(nn.Module):
    """Each token to its k best experts.

    Args:
        k: experts per token, 1 ≤ k ≤ E.
        gate: how logits become scores.
        renormalize: divide the k chosen scores by their sum. With the softmax gate that is the softmax
            over the chosen logits alone ("softmax after selection": Mixtral, Qwen3-MoE, GPT-OSS); False
            is "softmax before selection" (Switch, OLMoE).
        scale: multiplies the weights (routed scaling factor, DeepSeek-V2/V3).
        bias: [E] added to the scores for the choice only, never to the weights; a buffer, moved by
            loss-free balancing (Wang et al. 2024). None for no bias.
        groups: split experts into this many equal groups and choose within the best ones only.
        top_groups: how many groups a token may use.
        group_top: a group is worth the sum of its best `group_top` scores (2: DeepSeek-V3, 1: V2).

    Returns Routing with K = k, best first; every slot used, save those of padding and of -inf experts.

    Raises ValueError when k or the groups do not fit E.

    Source: Shazeer et al. 2017, section 2.1; DeepSeek-AI 2024 (V3), section 2.1.2.

    >>> routing = TopK(2)(torch.tensor([[2.0, 0.0, 1.0]]))
    >>> routing.experts.tolist(), [round(w, 2) for w in routing.weights[0].tolist()]
    ([[0, 2]], [0.73, 0.27])
    """

    bias: Tensor | None

    def __init__(
        self,
        k: int,
        *,
        gate: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        bias: Tensor | None = None,
        groups: int = 1,
        top_groups: int = 1,
        group_top: int = 2,
    ) -> None:
        super().__init__()
        self.k, self.gate, self.renormalize, self.scale = k, _check_gate(gate), renormalize, scale
        if not 1 <= top_groups <= groups:
            raise ValueError(f"top_groups={top_groups} of groups={groups}; use 1 ≤ top_groups ≤ groups")
        self.groups, self.top_groups, self.group_top = groups, top_groups, group_top
        self.register_buffer("bias", None if bias is None else bias.detach().clone().float())

    def forward(self, logits_TE: Tensor, *, mask: Tensor | None = None) -> Routing:
        num_experts = logits_TE.shape[1]
        check_top_k(self.k, num_experts, self.groups, self.top_groups)
        scores_TE = GATES[self.gate](logits_TE)
        choice_TE = scores_TE.detach()
        if self.bias is not None:
            if len(self.bias) != num_experts:
                raise ValueError(
                    f"bias has {len(self.bias)} entries but the router has {num_experts} experts"
                )
            choice_TE = choice_TE + self.bias
        if self.groups > 1:
            choice_TE = self._outside_best_groups(choice_TE)
        choice_TE = choice_TE.masked_fill(logits_TE == -torch.inf, -torch.inf)
        best = choice_TE.topk(self.k, dim=-1)
        chosen_TK = best.indices
        used_TK = best.values > -torch.inf
        if self.renormalize and self.gate == "softmax":
            chosen_logits = logits_TE.gather(1, chosen_TK).masked_fill(~used_TK, -torch.inf)
            weights_TK = chosen_logits.softmax(-1)
        else:
            weights_TK = scores_TE.gather(1, chosen_TK).masked_fill(~used_TK, 0)
            if self.renormalize:
                weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return make_routing(chosen_TK, weights_TK * self.scale, used_TK, scores_TE, logits_TE, mask)

    def _outside_best_groups(self, choice_TE: Tensor) -> Tensor:
        choice_TGE = choice_TE.view(choice_TE.shape[0], self.groups, choice_TE.shape[1] // self.groups)
        worth_TG = choice_TGE.topk(min(self.group_top, choice_TGE.shape[2]), dim=-1).values.sum(-1)
        best_TG = worth_TG.topk(self.top_groups, dim=-1).indices
        inside_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter(1, best_TG, True)
        return choice_TGE.masked_fill(~inside_TG.unsqueeze(-1), -torch.inf).flatten(1)


class TopP(nn.Module):
    """Each token to the smallest set of experts whose scores reach p, at least one.

    Args:
        p: 0 < p ≤ 1.
        max_k: most experts per token; None allows all E.
        renormalize: divide the chosen scores by their sum.

    Returns Routing with K = max_k or E, best first, later slots unused.

    Source: Huang et al. 2024 (dynamic routing), section 3.2.

    >>> routing = TopP(0.6)(torch.tensor([[3.0, 0.0, 0.0], [0.1, 0.0, 0.0]]))
    >>> routing.slots_per_token.tolist()
    [1, 2]
    """

    def __init__(self, p: float, *, max_k: int | None = None, renormalize: bool = False) -> None:
        super().__init__()
        if not 0 < p <= 1:
            raise ValueError(f"p={p}; should lie in 0 < p ≤ 1")
        self.p, self.max_k, self.renormalize = p, max_k, renormalize

    def forward(self, logits_TE: Tensor, *, mask: Tensor | None = None) -> Routing:
        k = check_max_k(self.max_k, logits_TE.shape[1])
        scores_TE = logits_TE.softmax(-1)
        best = scores_TE.sort(dim=-1, descending=True, stable=True)
        scores_TK, chosen_TK = best.values[:, :k], best.indices[:, :k]
        reached_before_TK = scores_TK.detach().cumsum(-1) - scores_TK.detach()
        used_TK = (reached_before_TK < self.p) & (scores_TK > 0)
        used_TK[:, 0] = True
        weights_TK = scores_TK.masked_fill(~used_TK, 0)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return make_routing(chosen_TK, weights_TK, used_TK, scores_TE, logits_TE, mask)


class Threshold(nn.Module):
    """Each token to every expert whose score is above a threshold.

    Args:
        threshold: scores above it are used.
        gate: how logits become scores.
        min_k: the best `min_k` experts are used whatever their score.
        max_k: most experts per token; None allows all E.

    >>> Threshold(0.5, gate="sigmoid")(torch.tensor([[1.0, 2.0, -1.0], [-1.0, -2.0, -3.0]])).experts.tolist()
    [[1, 0, -1], [0, -1, -1]]
    """

    def __init__(
        self, threshold: float, *, gate: str = "softmax", min_k: int = 1, max_k: int | None = None
    ) -> None:
        super().__init__()
        self.threshold, self.gate, self.min_k, self.max_k = threshold, _check_gate(gate), min_k, max_k

    def forward(self, logits_TE: Tensor, *, mask: Tensor | None = None) -> Routing:
        k = check_max_k(self.max_k, logits_TE.shape[1])
        if not 0 <= self.min_k <= k:
            raise ValueError(f"min_k={self.min_k}; use 0 ≤ min_k ≤ {k}")
        scores_TE = GATES[self.gate](logits_TE)
        best = scores_TE.sort(dim=-1, descending=True, stable=True)
        scores_TK, chosen_TK = best.values[:, :k], best.indices[:, :k]
        used_TK = scores_TK > self.threshold
        used_TK[:, : self.min_k] = True
        used_TK = used_TK & (logits_TE.gather(1, chosen_TK) > -torch.inf)
        return make_routing(chosen_TK, scores_TK, used_TK, scores_TE, logits_TE, mask)


class ExpertChoice(nn.Module):
    """Each expert takes the tokens that suit it best: perfect balance, a varying number of experts per token.

    An expert takes ceil(capacity_factor · T / E) of the T tokens that count. It looks at the whole batch,
    so in a causal language model later tokens influence earlier ones: use it in encoders, or knowingly.

    Args:
        capacity_factor: mean number of experts per token, 0 < capacity_factor ≤ E.
        gate: how logits become scores.

    Returns Routing with K = E: slot e holds expert e or is unused.

    Source: Zhou et al. 2022 (expert choice), section 3.2.

    >>> ExpertChoice(1.0)(torch.randn(6, 3)).load.tolist()
    [2, 2, 2]
    """

    def __init__(self, capacity_factor: float = 1.0, *, gate: str = "softmax") -> None:
        super().__init__()
        if capacity_factor <= 0:
            raise ValueError(f"capacity_factor={capacity_factor}; should be > 0")
        self.capacity_factor, self.gate = capacity_factor, _check_gate(gate)

    def forward(self, logits_TE: Tensor, *, mask: Tensor | None = None) -> Routing:
        tokens, num_experts = logits_TE.shape
        scores_TE = GATES[self.gate](logits_TE)
        choice_TE = scores_TE.detach().masked_fill(logits_TE == -torch.inf, -torch.inf)
        if mask is not None:
            choice_TE = choice_TE.masked_fill(~mask.unsqueeze(1), -torch.inf)
        counted = tokens if mask is None else mask.sum()
        capacity = torch.as_tensor(
            self.capacity_factor * counted / num_experts, device=logits_TE.device
        ).ceil()
        # rank by sorting whole columns: a capacity known only on the device needs no synchronisation
        order_TE = choice_TE.sort(dim=0, descending=True, stable=True).indices
        places_TE = torch.arange(tokens, device=logits_TE.device).unsqueeze(1).expand_as(order_TE)
        rank_TE = torch.empty_like(order_TE).scatter_(0, order_TE, places_TE)
        used_TE = (rank_TE < capacity) & (choice_TE > -torch.inf)
        experts_TE = torch.arange(num_experts, device=logits_TE.device).expand_as(used_TE)
        return make_routing(experts_TE, scores_TE, used_TE, scores_TE, logits_TE, mask)


class Dense(nn.Module):
    """Soft mixing: every expert, weighted by its score; one whose logit is -inf is not run.

    >>> Dense()(torch.zeros(1, 4)).weights.tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    >>> Dense()(torch.tensor([[0.0, -torch.inf, 0.0]])).experts.tolist()
    [[0, -1, 2]]
    """

    def __init__(self, *, gate: str = "softmax") -> None:
        super().__init__()
        self.gate = _check_gate(gate)

    def forward(self, logits_TE: Tensor, *, mask: Tensor | None = None) -> Routing:
        routing = Routing.dense(GATES[self.gate](logits_TE), logits_TE, mask)
        return routing.keep(logits_TE > -torch.inf)


def make_routing(
    chosen_TK: Tensor,
    weights_TK: Tensor,
    used_TK: Tensor,
    scores_TE: Tensor,
    logits_TE: Tensor,
    mask: Tensor | None,
) -> Routing:
    """A Routing in which slots outside `used_TK`, and all slots of padding tokens, are unused."""
    if mask is not None:
        used_TK = used_TK & mask.unsqueeze(1)
    return Routing(
        experts=chosen_TK.masked_fill(~used_TK, -1),
        weights=weights_TK.masked_fill(~used_TK, 0),
        scores=scores_TE,
        logits=logits_TE,
        num_experts=scores_TE.shape[1],
        mask=mask,
    )


def check_top_k(k: int, num_experts: int, groups: int = 1, top_groups: int = 1) -> None:
    """ValueError unless k experts can be chosen."""
    if num_experts % groups:
        raise ValueError(f"groups={groups} does not divide {num_experts} experts")
    reachable = num_experts // groups * top_groups
    if not 1 <= k <= reachable:
        within = f" in {top_groups} of {groups} groups" if groups > 1 else ""
        raise ValueError(
            f"top_k={k} but the router has {reachable} experts{within}; use 1 ≤ top_k ≤ {reachable}"
        )


def check_max_k(max_k: int | None, num_experts: int) -> int:
    """max_k, or E for None; ValueError unless it lies in 1 … E."""
    if max_k is not None and not 1 <= max_k <= num_experts:
        raise ValueError(
            f"max_k={max_k} but the router has {num_experts} experts; use 1 ≤ max_k ≤ {num_experts}"
        )
    return num_experts if max_k is None else max_k


def _check_gate(gate: str) -> str:
    if gate not in GATES:
        raise ValueError(f"gate={gate!r} is not known; use one of {', '.join(GATES)}")
    return gate
