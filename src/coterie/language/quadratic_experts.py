"""Experts u = -H (x - c) of known curvature H: up to which step is a stack of them stable, and how fast?

Letters: G step sizes γ tried at once, T tokens, D width, L layers. What is measured here by going through the
layers is derived in `coterie.nn.spectrum` for one curvature at a time.
"""

import torch
from torch import Tensor, nn

from coterie.nn import LinearScore, ModuleExperts, MoE, Residual, Router, TopK

_FAR = 100  # from the origin, where the experts' centres lie at about 4


def symmetric(eigenvalues: Tensor) -> Tensor:
    """A symmetric matrix [D, D] of these eigenvalues, turned at random by torch's generator.

    >>> torch.linalg.eigvalsh(symmetric(torch.tensor([1.0, 2.0], dtype=torch.float64))).round().tolist()
    [1.0, 2.0]
    """
    turn: Tensor = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues)).to(eigenvalues)).Q
    return turn * eigenvalues @ turn.t()


def lengths_by_layer(
    residual: Residual, hessian_DD: Tensor, gamma_G: Tensor, start_D: Tensor, layers: int
) -> Tensor:
    """|x| before each layer of u = -γ H x, and after the last, [L + 1, G].

    Args:
        residual: how updates join x; its own γ should be 1.
        hessian_DD: H.
        gamma_G: step sizes.
        start_D: x at first.
        layers: L.

    >>> from coterie.nn import PlainResidual
    >>> gamma = torch.tensor([0.5, 2.0])
    >>> lengths_by_layer(PlainResidual(), torch.eye(1), gamma, torch.ones(1), layers=2).tolist()
    [[1.0, 1.0], [0.5, 1.0], [0.25, 1.0]]
    """
    x_GD, state = start_D.expand(len(gamma_G), -1), None
    lengths = [x_GD.norm(dim=-1)]
    for _ in range(layers):
        update_GD = -gamma_G.unsqueeze(1) * (residual.point(x_GD, state) @ hessian_DD)
        x_GD, state = residual(x_GD, update_GD, state)
        lengths.append(x_GD.norm(dim=-1))
    return torch.stack(lengths)


@torch.no_grad()
def last_stable_of_four(
    residual: Residual, gamma_G: Tensor, *, alike: bool, tokens: int, layers: int = 200
) -> float:
    """The largest γ at which the mean of the tokens stays bounded over layers of four experts, two per token.

    Args:
        residual: as in `lengths_by_layer`.
        gamma_G: step sizes, from a stable one on, float64.
        alike: all experts have one H; otherwise each has its own. Eigenvalues are 0.1 to 1, the width is 16.
        tokens: T.
        layers: L, all the same.
    """
    eigenvalues = torch.logspace(0, -1, 16, dtype=torch.float64)
    hessian, experts = symmetric(eigenvalues), [nn.Linear(16, 16).double() for _ in range(4)]
    for expert in experts:
        hessian, centre = hessian if alike else symmetric(eigenvalues), torch.randn(16).double()
        expert.weight.copy_(-hessian)
        expert.bias.copy_(hessian @ centre)
    moe = MoE(Router(LinearScore(16, 4).double(), TopK(2)), ModuleExperts(experts))
    x_GTD, state = torch.randn(tokens, 16).double().expand(len(gamma_G), -1, -1), None
    for _ in range(layers):
        update_GTD, _routing = moe(x_GTD)
        x_GTD, state = residual(x_GTD, gamma_G.view(-1, 1, 1) * update_GTD, state)
    return last_stable(gamma_G, x_GTD.mean(1).norm(dim=-1) < _FAR)


def last_stable(gamma_G: Tensor, stable_G: Tensor) -> float:
    """The last γ before the first that is not stable.

    >>> last_stable(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True]))
    1.0
    """
    return float(gamma_G[int(stable_G.int().argmin()) - 1])
