"""The mixture-of-experts layer, and the dense feed-forward networks it stands beside."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.kernels.activations import get_activation
from coterie.nn.experts import Experts
from coterie.nn.routers import AnyRouter
from coterie.nn.routing import Routing


class MoE(nn.Module):
    """A mixture of experts.

    1. Flatten the leading dimensions of x to T tokens.
    2. The router decides which token goes to which experts with what weight.
    3. The experts run on their tokens; each token gets the weighted sum of its experts' outputs.
    4. The shared expert, if any, adds its output for every token.
    5. The leading dimensions come back.

    Args:
        router: any router over E experts.
        experts: any bank of E experts. One bank may serve several layers or routers.
        shared: a module applied to every token, such as `SwiGLU(dim, hidden)`.

    Returns (from forward, for x [..., D]): y [..., D_out] and the Routing of the flattened tokens.

    Context (forward's keyword arguments) goes to the router; `mask` and anything else of x's leading shape
    is flattened with x. See `coterie.nn.routers` for the keys in use.

    Raises ValueError when router and bank differ in E, and for integer tokens or a wrong width.

    >>> from coterie.nn import LinearScore, Router, SwiGLUExperts, TopK
    >>> moe = MoE(Router(LinearScore(16, 8), TopK(2)), SwiGLUExperts(8, 16, 32))
    >>> y, routing = moe(torch.randn(4, 10, 16))
    >>> y.shape, routing.load.sum().item()
    (torch.Size([4, 10, 16]), 80)
    """

    def __init__(self, router: AnyRouter, experts: Experts, shared: nn.Module | None = None) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(
                f"the router chooses among {router.num_experts} experts "
                f"but the bank holds {experts.num_experts}"
            )
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, x: Tensor, **context: Any) -> tuple[Tensor, Routing]:
        shape = x.shape[:-1]
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD, shape=shape, **flatten_context(context, shape))
        y_TD = self.experts(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view(*shape, y_TD.shape[-1]), routing


def flatten_context(context: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
    """The context with every tensor of the tokens' leading shape flattened to [T]."""
    return {
        key: value.reshape(-1) if isinstance(value, Tensor) and value.shape == shape else value
        for key, value in context.items()
    }


class SwiGLU(nn.Module):
    """The dense gated feed-forward network: down(silu(gate(x)) · up(x)).

    Args:
        dim: D.
        hidden: F.

    Source: Shazeer 2020 (GLU variants).

    >>> SwiGLU(8, 16)(torch.randn(5, 8)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class MLP(nn.Module):
    """The dense two-layer feed-forward network: down(act(up(x))), with biases.

    Args:
        dim: D.
        hidden: F.
        activation: a name in `coterie.kernels.ACTIVATIONS`.

    >>> MLP(8, 16)(torch.randn(5, 8)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int, hidden: int, *, activation: str = "gelu") -> None:
        super().__init__()
        get_activation(activation)
        self.activation = activation
        self.up_proj = nn.Linear(dim, hidden)
        self.down_proj = nn.Linear(hidden, dim)
        for projection in (self.up_proj, self.down_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(get_activation(self.activation)(self.up_proj(x)))
        return y


class Gated(nn.Module):
    """A shared expert scaled per token by a sigmoid gate (Qwen2-MoE).

    >>> Gated(SwiGLU(8, 16), dim=8)(torch.randn(5, 8)).shape
    torch.Size([5, 8])
    """

    def __init__(self, module: nn.Module, dim: int) -> None:
        super().__init__()
        self.module = module
        self.gate = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.sigmoid(self.gate(x)) * self.module(x)
        return y
