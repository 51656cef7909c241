"""The functional forms of growth: what a person's growth factors are multiplied with at each time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CurveName = Literal["bilinear", "linear", "quadratic", "exponential", "jenss_bayley"]


@dataclass(frozen=True)
class Curve:
    """y(t) = loadings(t, bend) · growth factors.

    Args:
        factors: names of the P growth factors, which differ between persons.
        loadings: (t [T, J], bend [K]) → [T, K, J, P].
        bend: name of the one parameter that enters nonlinearly and is the same within a class; "" for none.
        bounds: (first time, last time) → the interval in which the bend is looked for.
        occasions: the fewest distinct times that can tell the curve's parts apart.
        from_zero: whether the curve describes growth from time 0 on.
    """

    factors: tuple[str, ...]
    loadings: Callable[[Tensor, Tensor], Tensor]
    bend: str = ""
    bounds: Callable[[float, float], tuple[float, float]] = lambda first, last: (first, last)
    occasions: int = 3
    from_zero: bool = False


def absolute(u: Tensor) -> Tensor:
    """|u|, smooth at 0, so that the likelihood has derivatives in the knot."""
    return (u * u + 1e-8).sqrt()


def bilinear_loadings(t_TJ: Tensor, knot_K: Tensor) -> Tensor:
    """[1, min(t, γ), max(t - γ, 0)]: growth factors are the value at t = 0 and the slopes before and after γ.

    The paper estimates (η0 + γ η1, (η1 + η2) / 2, (η2 - η1) / 2) with loadings [1, t - γ, |t - γ|] and
    transforms back. Written with the same smooth |t - γ|, these loadings span the same space, so that the
    likelihood is the same and there is nothing to transform.

    >>> bilinear_loadings(torch.tensor([[0.0, 2.0, 5.0]]), torch.tensor([3.0]))[0, 0].round().tolist()
    [[1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [1.0, 3.0, 2.0]]
    """
    past_TKJ = t_TJ[:, None] - knot_K[:, None]
    after_TKJ = (past_TKJ + absolute(past_TKJ)) / 2
    return torch.stack([torch.ones_like(past_TKJ), t_TJ[:, None] - after_TKJ, after_TKJ], dim=-1)


def _polynomial(degree: int) -> Callable[[Tensor, Tensor], Tensor]:
    def loadings(t_TJ: Tensor, bend_K: Tensor) -> Tensor:
        powers_TJP = torch.stack([t_TJ**power for power in range(degree + 1)], dim=-1)
        return powers_TJP[:, None].expand(-1, len(bend_K), -1, -1)

    return loadings


def _exponential(t_TJ: Tensor, rate_K: Tensor) -> Tensor:
    grown_TKJ = 1 - torch.exp(-rate_K[:, None] * t_TJ[:, None])
    return torch.stack([torch.ones_like(grown_TKJ), grown_TKJ], dim=-1)


def _jenss_bayley(t_TJ: Tensor, decay_K: Tensor) -> Tensor:
    bent_TKJ = torch.exp(decay_K[:, None] * t_TJ[:, None]) - 1
    line_TKJ = t_TJ[:, None].expand_as(bent_TKJ)
    return torch.stack([torch.ones_like(bent_TKJ), line_TKJ, bent_TKJ], dim=-1)


CURVES: dict[CurveName, Curve] = {
    "linear": Curve(("intercept", "slope"), _polynomial(1), occasions=2),
    "quadratic": Curve(("intercept", "slope", "quadratic"), _polynomial(2)),
    "bilinear": Curve(("intercept", "slope 1", "slope 2"), bilinear_loadings, "knot", occasions=4),
    "exponential": Curve(
        ("intercept", "growth"),
        _exponential,
        "rate",
        # slower is a line, faster is over before the second of twenty occasions
        lambda first, last: (0.1 / last, 20 / last),
        from_zero=True,
    ),
    "jenss_bayley": Curve(
        ("intercept", "late slope", "early growth"),
        _jenss_bayley,
        "decay",
        lambda first, last: (-20 / last, -0.1 / last),
        occasions=4,
        from_zero=True,
    ),
}
