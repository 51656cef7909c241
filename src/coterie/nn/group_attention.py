"""Experts that share what they have found: attention among the active experts of a group.

Letters besides those of `coterie.nn.routing`: G groups, M experts of a group (E = G · M; expert e is member
e mod M of group e div M).
"""

import torch
from torch import Tensor, nn

from coterie.kernels.activations import get_activation
from coterie.nn.experts import check_routing
from coterie.nn.routing import Routing


class GroupAttention(nn.Module):
    """Each active expert's hidden vector plus what it reads from the active experts of its group.

    h + softmax(Q Kᵀ / √F) V over the active members, itself among them; one W_Q, W_K, W_V for all groups. No
    attention across groups. An inactive expert is not read, and what it holds comes back unchanged.

    Args:
        dim: width F of a hidden vector.
        num_groups: G.

    Returns (from forward, for h [T, G, M, F] and active, bool [T, G, M]): [T, G, M, F].

    Raises ValueError (from forward) for another shape.

    Source: Yu et al. 2024 (MIGA), inner-group attention.

    >>> attention = GroupAttention(8, num_groups=2)
    >>> h, active = torch.randn(5, 2, 4, 8), torch.rand(5, 2, 4) > 0.5
    >>> attention(h, active).shape
    torch.Size([5, 2, 4, 8])
    """

    def __init__(self, dim: int, num_groups: int) -> None:
        super().__init__()
        self.dim, self.num_groups = dim, num_groups
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)

    def forward(self, h_TGMF: Tensor, active_TGM: Tensor) -> Tensor:
        if h_TGMF.dim() != 4 or h_TGMF.shape[1] != self.num_groups or h_TGMF.shape[3] != self.dim:
            raise ValueError(
                f"hidden vectors have shape {tuple(h_TGMF.shape)}; should be "
                f"[T, {self.num_groups}, M, {self.dim}]"
            )
        if active_TGM.shape != h_TGMF.shape[:3]:
            raise ValueError(
                f"active has shape {tuple(active_TGM.shape)}; should be {tuple(h_TGMF.shape[:3])}"
            )
        logits_TGMM = self.query(h_TGMF) @ self.key(h_TGMF).transpose(2, 3) * self.dim**-0.5
        together_TGMM = active_TGM.unsqueeze(3) & active_TGM.unsqueeze(2)
        # the smallest number, not -inf: a group without active experts must not become NaN
        lowest = torch.finfo(logits_TGMM.dtype).min
        weights_TGMM = logits_TGMM.masked_fill(~together_TGMM, lowest).softmax(-1)
        read_TGMF: Tensor = weights_TGMM.masked_fill(~together_TGMM, 0) @ self.value(h_TGMF)
        return h_TGMF + read_TGMF


class GroupAttentionExperts(nn.Module):
    """E two-layer MLPs in groups, which talk between their layers: down(attend(act(up(x)))).

    What `MLPExperts` computes, with `GroupAttention` on the hidden vectors of the experts a token goes to.
    Every expert's first layer runs on every token, so this bank is for few, small experts.

    Args:
        num_experts: E.
        dim: D, width of a token.
        hidden: F, width inside an expert.
        num_groups: G, which divides E.
        dim_out: width of the result, D by default.
        activation: a name in `coterie.kernels.ACTIVATIONS`.

    Returns (from forward, for x [T, D]): [T, dim_out].

    Raises ValueError where the groups do not divide the experts.

    Source: Yu et al. 2024 (MIGA).

    >>> bank = GroupAttentionExperts(8, dim=6, hidden=16, num_groups=2, dim_out=1)
    >>> bank(torch.randn(5, 6), Routing.dense(torch.rand(5, 8))).shape
    torch.Size([5, 1])
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        num_groups: int,
        dim_out: int | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_experts % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide {num_experts} experts")
        dim_out = dim_out or dim
        self.num_experts, self.num_groups = num_experts, num_groups
        self.activation = get_activation(activation)
        self.up_proj = nn.Parameter(torch.randn(num_experts, hidden, dim) * dim**-0.5)
        self.up_bias = nn.Parameter(torch.zeros(num_experts, hidden))
        self.attention = GroupAttention(hidden, num_groups)
        self.down_proj = nn.Parameter(torch.randn(num_experts, dim_out, hidden) * hidden**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(num_experts, dim_out))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_routing(self.num_experts, routing)
        h_TEF = self.activation(torch.einsum("td,efd->tef", x_TD, self.up_proj) + self.up_bias)
        groups = (len(x_TD), self.num_groups, self.num_experts // self.num_groups)
        h_TGMF = self.attention(h_TEF.view(*groups, self.attention.dim), routing.used_TE.reshape(groups))
        y_TEO = torch.einsum("tef,eof->teo", h_TGMF.flatten(1, 2), self.down_proj) + self.down_bias
        return torch.einsum("te,teo->to", routing.weights_TE.to(y_TEO), y_TEO)
