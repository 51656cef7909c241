"""One bank of experts for several tasks, each with a gate of its own."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.nn.experts import Experts
from coterie.nn.feature_gate import uniform
from coterie.nn.moe import flatten_context
from coterie.nn.routers import AnyRouter
from coterie.nn.routing import Routing


class MultiGateMoE(nn.Module):
    """A mixture of experts with one gate per task: task t gets Σ_e g_e^t(x) f_e(x).

    Args:
        routers: one per task, all over the bank's E experts.
        experts: any bank; an expert that two tasks choose for a token runs for each of them.

    Returns (from forward, for x [..., D]): per task y [..., D_out], and per task the Routing of the flattened
    tokens. Context goes to every router.

    Raises ValueError for no router, or one over another number of experts.

    Source: Ma et al. 2018 (MMoE), section 4.2.

    >>> from coterie.nn import Dense, LinearScore, MLPExperts, Router
    >>> gates = [Router(LinearScore(16, 4), Dense()) for _ in ("watched", "rating")]
    >>> moe = MultiGateMoE(gates, MLPExperts(4, 16, 32, dim_out=8))
    >>> (watched, rating), routings = moe(torch.randn(5, 16))
    >>> watched.shape, rating.shape, len(routings)
    (torch.Size([5, 8]), torch.Size([5, 8]), 2)
    """

    def __init__(self, routers: Iterable[AnyRouter], experts: Experts) -> None:
        super().__init__()
        self.routers = nn.ModuleList(routers)  # type: ignore[arg-type]
        self.experts = experts
        if not len(self.routers):
            raise ValueError("MultiGateMoE got no routers; give one per task")
        for task, router in enumerate(self.routers):
            if router.num_experts != experts.num_experts:
                raise ValueError(
                    f"the router of task {task} chooses among {router.num_experts} experts "
                    f"but the bank holds {experts.num_experts}"
                )

    def forward(self, x: Tensor, **context: Any) -> tuple[list[Tensor], list[Routing]]:
        shape: torch.Size = x.shape[:-1]
        flat, x_TD = flatten_context(context, shape), x.reshape(-1, x.shape[-1])
        routings = [router(x_TD, shape=shape, **flat) for router in self.routers]
        outputs = [self.experts(x_TD, routing) for routing in routings]
        return [y_TD.view(*shape, y_TD.shape[-1]) for y_TD in outputs], routings


class MaskedGates(nn.Module):
    """G dense linear gates over E experts, of which each may reach only some: which ones is a matrix.

    A gate's weights are a softmax over the experts it reaches, and 0 elsewhere. There are parameters for
    reachable pairs alone.

    Args:
        dim: Q, width of a gate's input.
        reach_GE: bool [G, E], True where gate g may use expert e.
        lone: of a gate that reaches a single expert: "softmax" gives it the constant 1, "sigmoid" a weight
            that depends on the input.

    Returns (from forward, for x [T, Q], or [T, G, Q] with an input for each gate): weights [T, G, E].

    Raises ValueError for a gate that reaches nothing.

    Source: Ma et al. 2018 (MMoE), equation 6, where every gate reaches all; Wang et al. 2025 (HoME).

    >>> gates = MaskedGates(3, torch.tensor([[True, True, False], [False, True, True]]))
    >>> weights = gates(torch.randn(5, 3))
    >>> weights.shape, weights[:, 0, 2].tolist(), torch.allclose(weights.sum(-1), torch.ones(5, 2))
    (torch.Size([5, 2, 3]), [0.0, 0.0, 0.0, 0.0, 0.0], True)
    """

    reach_GE: Tensor
    gate_N: Tensor
    place_N: Tensor
    lone_G: Tensor

    def __init__(
        self, dim: int, reach_GE: Tensor, *, lone: Literal["softmax", "sigmoid"] = "softmax"
    ) -> None:
        super().__init__()
        if reach_GE.dim() != 2 or not reach_GE.numel() or not bool(reach_GE.any(1).all()):
            stuck = (~reach_GE.any(-1)).nonzero().flatten().tolist() if reach_GE.dim() == 2 else []
            raise ValueError(
                f"reach_GE has shape {tuple(reach_GE.shape)} and gates {stuck} reach no expert; "
                "should be [gates, experts] with a True in every row"
            )
        reach_GE = reach_GE.bool()
        gate_N, expert_N = reach_GE.nonzero(as_tuple=True)
        # not persistent: they follow from the arguments, and checkpoints hold what was learnt
        self.register_buffer("reach_GE", reach_GE, persistent=False)
        self.register_buffer("gate_N", gate_N, persistent=False)
        self.register_buffer("place_N", gate_N * reach_GE.shape[1] + expert_N, persistent=False)
        self.register_buffer("lone_G", (reach_GE.sum(1) == 1) & (lone == "sigmoid"), persistent=False)
        self.weight = uniform(len(gate_N), dim, fan_in=dim)
        self.bias = uniform(len(gate_N), fan_in=dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            logits_TN = F.linear(x, self.weight, self.bias)
        else:
            logits_TN = (x[:, self.gate_N] * self.weight).sum(-1) + self.bias
        blank = logits_TN.new_full((len(x), self.reach_GE.numel()), -torch.inf)
        logits_TGE = blank.index_copy(1, self.place_N, logits_TN).view(len(x), *self.reach_GE.shape)
        weights_TGE = logits_TGE.softmax(-1)
        if bool(self.lone_G.any()):
            return torch.where(self.lone_G[:, None], logits_TGE.sigmoid(), weights_TGE)
        return weights_TGE
