"""One bank of experts for several tasks, each with a router of its own."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from coterie.nn.experts import Experts
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
