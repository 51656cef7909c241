"""Is a stack of residual layers stable? Linearised: in every layer u = -s x, with the same curvature s."""

from collections.abc import Callable

import torch
from torch import Tensor

from coterie.nn.depth import DepthState, MomentumResidual


def stability_limit(mu: float = 0.0) -> float:
    """The largest γ s at which momentum converges on a curvature s > 0: 2 (1 + μ), so 2 without momentum.

    Args:
        mu: μ of heavy-ball momentum, 0 ≤ μ < 1.

    Raises:
        ValueError: μ out of range.

    >>> stability_limit(), stability_limit(0.7)
    (2.0, 3.4)
    """
    if not 0 <= mu < 1:
        raise ValueError(f"mu={mu}; should lie in 0 ≤ mu < 1")
    return 2 * (1 + mu)


@torch.no_grad()
def spectral_radius(residual: MomentumResidual, curvature: Tensor) -> Tensor:
    """By which factor a layer multiplies x and its momentum, in the long run; below 1 the stack converges.

    For heavy-ball momentum the largest |λ| with λ² - (1 + μ - γ s) λ + μ = 0. Found by applying the residual
    itself, so it holds for a lookahead too.

    Args:
        residual: with μ = 0 for a plain step of γ.
        curvature: s, any shape, real or complex, such as `curvatures` returns.

    Returns: float64, the same shape.

    >>> s = torch.tensor([0.0, 1.0, 3.3, 3.5])
    >>> [round(r, 2) for r in spectral_radius(MomentumResidual(mu=0.7, gamma=1.0), s).tolist()]
    [1.0, 0.84, 0.84, 1.23]
    """
    s = curvature.to(torch.promote_types(curvature.dtype, torch.float64))
    columns = []
    for x, p in ((torch.ones_like(s), torch.zeros_like(s)), (torch.zeros_like(s), torch.ones_like(s))):
        before = DepthState(momentum=p)
        x, after = residual(x, -s * residual.point(x, before), before)
        columns.append(torch.stack([x, after.momentum], dim=-1))
    radius: Tensor = torch.linalg.eigvals(torch.stack(columns, dim=-1)).abs().amax(-1)
    return radius


def curvatures(block: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
    """Eigenvalues of minus the Jacobian of a token-wise block, at each token.

    Along an eigenvector of eigenvalue s the block acts as u = -s x. D backward passes: for small D.

    Args:
        block: tokens [T, D] to updates [T, D], each from its own token alone: `lambda x: moe(norm(x))[0]`.
        x_TD: where to linearise.

    Returns: complex [T, D].

    Raises:
        ValueError: the block changes the shape.

    >>> curvatures(lambda x: -0.5 * x, torch.randn(3, 2)).real.tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """
    with torch.enable_grad():
        x_TD = x_TD.detach().requires_grad_()
        u_TD = block(x_TD)
        if u_TD.shape != x_TD.shape:
            raise ValueError(
                f"the block maps {tuple(x_TD.shape)} to {tuple(u_TD.shape)}; the shape should stay"
            )
        rows = [
            torch.autograd.grad(u_TD[:, d].sum(), x_TD, retain_graph=True)[0] for d in range(x_TD.shape[1])
        ]
    eigenvalues: Tensor = torch.linalg.eigvals(-torch.stack(rows, dim=1))
    return eigenvalues
