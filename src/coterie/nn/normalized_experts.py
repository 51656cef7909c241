"""Experts whose outputs are all wanted, by several gates, and are brought to one scale."""

import torch
from torch import Tensor, nn

from coterie.kernels.activations import get_activation
from coterie.nn.feature_gate import uniform


class NormalizedExperts(nn.Module):
    """E one-layer experts, each act(BatchNorm(x W_e + b_e)), every one applied to every token.

    What comes back is not combined yet, so that any number of gates can share it. BatchNorm has a scale, a
    shift and running statistics of its own for every output of every expert: their outputs get one scale,
    and with a smooth activation hardly any is exactly zero.

    Args:
        num_experts: E.
        dim: D, width of a token.
        dim_out: H, width of an expert's output.
        norm: without it, plain act(x W_e + b_e).
        activation: a name in `coterie.kernels.ACTIVATIONS`.

    Returns (from forward, for x [T, D], or [T, E, D] with an input for each expert): [T, E, H].

    Raises ValueError for a batch of one token while training, of which there is no deviation.

    Source: Wang et al. 2025 (HoME), expert normalization.

    >>> experts = NormalizedExperts(num_experts=4, dim=8, dim_out=3)
    >>> outputs = experts(torch.randn(100, 8))
    >>> outputs.shape, bool((outputs == 0).any())
    (torch.Size([100, 4, 3]), False)
    """

    def __init__(
        self, num_experts: int, dim: int, dim_out: int, *, norm: bool = True, activation: str = "silu"
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.act = get_activation(activation)
        self.weight = uniform(num_experts, dim, dim_out, fan_in=dim)
        self.bias = uniform(num_experts, dim_out, fan_in=dim)
        self.norm = nn.BatchNorm1d(num_experts * dim_out) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            z_TEH = torch.einsum("td,edh->teh", x, self.weight) + self.bias
        else:
            z_TEH = torch.einsum("ted,edh->teh", x, self.weight) + self.bias
        if self.norm is not None:
            z_TEH = self.norm(z_TEH.flatten(1)).view_as(z_TEH)
        return self.act(z_TEH)
