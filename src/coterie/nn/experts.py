"""Banks of experts: tokens and a Routing in, each token's weighted sum of expert outputs out.

A bank is any module with `num_experts` and `forward(x_TD, routing) -> [T, D_out]`. Parameters keep the
layout of transformers 5: `gate_up_proj` [E, 2F, D] with the gate rows first, `down_proj` [E, D_out, F].
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from coterie.kernels import ClampedSwiGLU, grouped_mlp
from coterie.kernels.activations import check_activation, get_activation
from coterie.nn.routing import Routing


class Experts(Protocol):
    """Anything that applies experts."""

    @property
    def num_experts(self) -> int: ...

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor: ...


class SwiGLUExperts(nn.Module):
    """E gated MLPs: down(act(gate(x)) · up(x)).

    Args:
        num_experts: E.
        dim: D, width of a token.
        hidden: F, width inside an expert.
        dim_out: width of the result, D by default.
        bias: biases on both layers.
        activation: "silu" makes it SwiGLU, "gelu" GeGLU, and so on; or a `coterie.kernels.ClampedSwiGLU`.

    Returns (from forward, for x [T, D]): [T, dim_out].

    Source: Shazeer 2020 (GLU variants).

    >>> bank = SwiGLUExperts(num_experts=4, dim=8, hidden=16)
    >>> bank(torch.randn(5, 8), Routing.dense(torch.rand(5, 4))).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        dim_out: int | None = None,
        bias: bool = False,
        activation: str | ClampedSwiGLU = "silu",
    ) -> None:
        super().__init__()
        check_activation(activation, gated=True)
        self.num_experts, self.dim, self.hidden, self.activation = num_experts, dim, hidden, activation
        dim_out = dim_out or dim
        self.gate_up_proj = _matrix(num_experts, 2 * hidden, dim)
        self.down_proj = _matrix(num_experts, dim_out, hidden)
        self.gate_up_bias = nn.Parameter(torch.zeros(num_experts, 2 * hidden)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(num_experts, dim_out)) if bias else None

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_routing(self.num_experts, routing)
        return grouped_mlp(
            x_TD,
            routing.weights,
            routing.dispatch,
            self.gate_up_proj,
            self.down_proj,
            self.gate_up_bias,
            self.down_bias,
            activation=self.activation,
            gated=True,
        )


class MLPExperts(nn.Module):
    """E two-layer MLPs: down(act(up(x))).

    Args:
        num_experts: E.
        dim: D, width of a token.
        hidden: F, width inside an expert.
        dim_out: width of the result, D by default.
        bias: biases on both layers.
        activation: a name in `coterie.kernels.ACTIVATIONS`.

    Returns (from forward, for x [T, D]): [T, dim_out].

    >>> bank = MLPExperts(num_experts=4, dim=8, hidden=16, dim_out=3)
    >>> bank(torch.randn(5, 8), Routing.dense(torch.rand(5, 4))).shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        dim_out: int | None = None,
        bias: bool = True,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        get_activation(activation)
        self.num_experts, self.dim, self.hidden, self.activation = num_experts, dim, hidden, activation
        dim_out = dim_out or dim
        self.up_proj = _matrix(num_experts, hidden, dim)
        self.down_proj = _matrix(num_experts, dim_out, hidden)
        self.up_bias = nn.Parameter(torch.zeros(num_experts, hidden)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(num_experts, dim_out)) if bias else None

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_routing(self.num_experts, routing)
        return grouped_mlp(
            x_TD,
            routing.weights,
            routing.dispatch,
            self.up_proj,
            self.down_proj,
            self.up_bias,
            self.down_bias,
            activation=self.activation,
            gated=False,
        )


class LinearExperts(nn.Module):
    """E linear maps, mixed by the gate: one matrix per expert.

    Computed as one product over all experts, which suits few experts or a dense gate.

    Args:
        num_experts: E.
        dim: D, width of a token.
        dim_out: width of the result, D by default.
        bias: a bias per expert.
        identity: start as the identity (needs dim_out = D), so that a new bank changes nothing; else as
            `nn.Linear` starts.

    Returns (from forward, for x [T, D]): [T, dim_out]. `each(x)` gives every expert's own result, for
    mixtures of something else than the outputs, such as their sigmoids.

    Raises ValueError for an identity between different widths.

    >>> bank = LinearExperts(num_experts=3, dim=8, identity=True)
    >>> x = torch.randn(5, 8)
    >>> torch.allclose(bank(x, Routing.dense(torch.rand(5, 3).softmax(1))), x, atol=1e-5)
    True
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        dim_out: int | None = None,
        *,
        bias: bool = False,
        identity: bool = False,
    ) -> None:
        super().__init__()
        dim_out = dim_out or dim
        if identity and dim_out != dim:
            raise ValueError(f"identity=True maps {dim} to {dim_out}; give dim_out={dim}")
        self.num_experts, self.dim = num_experts, dim
        self.weight = nn.Parameter(torch.empty(num_experts, dim_out, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts, dim_out)) if bias else None
        if identity:
            nn.init.constant_(self.weight, 0)
            self.weight.data += torch.eye(dim)
        else:
            nn.init.uniform_(self.weight, -(dim**-0.5), dim**-0.5)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_routing(self.num_experts, routing)
        weights_TE = routing.weights_TE.to(x_TD.dtype)
        # one product of [T, E D] with [E D, O]: many small ones would cost more than what they leave out
        weighted_TC = (weights_TE.unsqueeze(2) * x_TD.unsqueeze(1)).flatten(1)
        y_TD = weighted_TC @ self.weight.transpose(1, 2).flatten(0, 1)
        return y_TD if self.bias is None else y_TD + weights_TE @ self.bias

    def each(self, x_TD: Tensor) -> Tensor:
        """Every expert's result, [T, E, dim_out]."""
        y_TEO = (x_TD @ self.weight.flatten(0, 1).t()).view(len(x_TD), *self.weight.shape[:2])
        return y_TEO if self.bias is None else y_TEO + self.bias


class ModuleExperts(nn.Module):
    """Any modules as experts: different sizes, kinds, frozen ones. Each sees only its own tokens.

    Runs one after the other and reads the group sizes on the host (a synchronisation on a GPU).

    Args:
        modules: each maps [n, D] to [n, D_out]; all to the same D_out. An expert without tokens is
            called on none, so that its output width is known and distributed training sees its parameters.

    >>> bank = ModuleExperts([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))])
    >>> bank(torch.randn(5, 8), Routing.dense(torch.rand(5, 2))).shape
    torch.Size([5, 8])
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(modules)
        if not len(self.experts):
            raise ValueError("ModuleExperts got no modules; give at least one")
        self.num_experts = len(self.experts)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_routing(self.num_experts, routing)
        dispatch, weights_N = routing.dispatch, routing.weights.reshape(-1)
        starts = [0, *dispatch.ends_E.tolist()]
        slots = [dispatch.order_N[a:b] for a, b in pairwise(starts)]
        tokens = [s // dispatch.slots for s in slots]
        outputs = [expert(x_TD[t]) for expert, t in zip(self.experts, tokens, strict=True)]
        y_TD: Tensor = outputs[0].new_zeros(x_TD.shape[0], outputs[0].shape[-1])
        rows_ND, weights_N = torch.cat(outputs), weights_N[torch.cat(slots)]
        return y_TD.index_add(0, torch.cat(tokens), rows_ND * weights_N.to(rows_ND.dtype).unsqueeze(1))


class ConcatExperts(nn.Module):
    """Several banks behind one router: expert ids run through the banks in order.

    >>> bank = ConcatExperts(SwiGLUExperts(4, 8, 16), MLPExperts(2, 8, 4))
    >>> bank.num_experts, bank(torch.randn(5, 8), Routing.dense(torch.rand(5, 6))).shape
    (6, torch.Size([5, 8]))
    """

    def __init__(self, *banks: nn.Module) -> None:
        super().__init__()
        if not banks:
            raise ValueError("ConcatExperts got no banks; give at least one")
        self.banks = nn.ModuleList(banks)
        self.num_experts = sum(self._sizes())

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_routing(self.num_experts, routing)
        first, outputs = 0, []
        for bank, size in zip(self.banks, self._sizes(), strict=True):
            outputs.append(bank(x_TD, routing.narrow(first, size)))
            first += size
        return torch.stack(outputs).sum(0)

    def _sizes(self) -> list[int]:
        return [int(bank.num_experts) for bank in self.banks]  # type: ignore[arg-type]


def _matrix(num_experts: int, rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(num_experts, rows, columns) * columns**-0.5)


def check_routing(num_experts: int, routing: Routing) -> None:
    if routing.num_experts != num_experts:
        raise ValueError(
            f"the routing is over {routing.num_experts} experts but the bank holds {num_experts}"
        )
