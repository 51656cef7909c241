"""A view of its own for every bank of experts: low-rank gates that scale the features."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureGate(nn.Module):
    """Scales features by factors that depend on them: x · Σ_l softmax(W x)_l · 2 sigmoid(x B_l A_l).

    The gates start as the identity, since every A_l starts at zero.

    Args:
        dim: D, features.
        ranks: of the products B_l A_l; the factors of several ranks are mixed.
        num_gates: G, gates side by side, each with weights of its own.

    Returns (from forward, for x [T, D] or [T, G, D]): [T, G, D].

    Raises ValueError for no rank or one below 1.

    Source: Wang et al. 2025 (HoME), Fea-gate; that the mixture over ranks depends on x is our reading.

    >>> gate = FeatureGate(6, ranks=(2, 3), num_gates=4)
    >>> x = torch.randn(5, 6)
    >>> gate(x).shape, torch.allclose(gate(x)[:, 0], x)
    (torch.Size([5, 4, 6]), True)
    """

    def __init__(self, dim: int, ranks: Sequence[int], num_gates: int = 1) -> None:
        super().__init__()
        if not ranks or min(ranks) < 1:
            raise ValueError(f"ranks={tuple(ranks)}; give at least one, each at least 1")
        self.down = nn.ParameterList(uniform(num_gates, dim, rank, fan_in=dim) for rank in ranks)
        self.up = nn.ParameterList(torch.zeros(num_gates, rank, dim) for rank in ranks)
        self.mix = uniform(num_gates, dim, len(ranks), fan_in=dim) if len(ranks) > 1 else None
        self.mix_bias = uniform(num_gates, 1, len(ranks), fan_in=dim) if len(ranks) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x_GTD = x.expand(self.up[0].shape[0], -1, -1) if x.dim() == 2 else x.transpose(0, 1)
        return (x_GTD * self._factor(x_GTD)).transpose(0, 1)

    def _factor(self, x_GTD: Tensor) -> Tensor:
        factors_LGTD = torch.stack(
            [2 * (x_GTD @ down @ up).sigmoid() for down, up in zip(self.down, self.up, strict=True)]
        )
        if self.mix is None or self.mix_bias is None:
            return factors_LGTD[0]
        shares_GTL = F.softmax(torch.baddbmm(self.mix_bias, x_GTD, self.mix), dim=-1)
        return torch.einsum("gtl,lgtd->gtd", shares_GTL, factors_LGTD)


def uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter as `nn.Linear` starts its own: uniform within ±1/√fan_in."""
    return nn.Parameter(torch.empty(*shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))
