"""State across depth: how a layer's update joins the residual stream.

x + u, with u the output of a mixture of experts, can be read as a step of gradient descent on the tokens, in
which depth is time. The steps of other optimisers are then other residuals: momentum, Adam, robust momentum.

Every residual here is used in two steps, and keeps nothing between calls:

    u = block(residual.point(x, state))
    x, state = residual(x, u, state)

The state is None where a model's forward begins, and handed from layer to layer. A token's state depends on
its own way through depth alone: it is no buffer, needs no cache in decoding, and gradients flow through it.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from coterie.nn.score import wide


class DepthState(NamedTuple):
    """What layers hand on beside x [..., D]; every tensor has x's shape.

    Args:
        momentum: p of heavy-ball momentum.
        mean: Adam's first moment, over the layers so far; None before the first Adam layer.
        square: Adam's second moment.
        adam_layers: how many layers the two moments are over.
    """

    momentum: Tensor
    mean: Tensor | None = None
    square: Tensor | None = None
    adam_layers: int = 0


class Residual(Protocol):
    """Takes a layer's update into x [..., D]."""

    def point(self, x: Tensor, state: DepthState | None) -> Tensor:
        """Where the layer computes its update: x itself, save for methods that look ahead."""
        ...

    def __call__(
        self, x: Tensor, update: Tensor, state: DepthState | None
    ) -> tuple[Tensor, DepthState | None]:
        """The new x and the new state."""
        ...


class PlainResidual(nn.Module):
    """x + u. The state of other layers passes through.

    >>> x, state = PlainResidual()(torch.ones(3), torch.ones(3), None)
    >>> x.tolist(), state
    ([2.0, 2.0, 2.0], None)
    """

    def point(self, x: Tensor, state: DepthState | None) -> Tensor:
        return x

    def forward(
        self, x: Tensor, update: Tensor, state: DepthState | None
    ) -> tuple[Tensor, DepthState | None]:
        return x + update, state


class MomentumResidual(nn.Module):
    """Heavy-ball momentum over depth: p ← μ p + u, then x + γ p.

    A steady update is taken in with a step of γ / (1 - μ) in the end: compare methods at equal ones, too.

    Args:
        mu: μ, 0 ≤ μ < 1. At 0 this is x + γ u.
        gamma: γ > 0.
        lookahead: updates are computed at x + lookahead · γ p. μ makes this Nesterov's momentum; see also
            `robust_momentum`.
        learnable: μ and γ are parameters that start at these values and keep to their ranges.

    Raises:
        ValueError: μ or γ out of range; from forward, a state of another shape.

    Source: Teo and Nguyen 2024 (MomentumSMoE, arXiv 2410.14574); Polyak 1964.

    >>> residual, state = MomentumResidual(mu=0.5, gamma=1.0), None
    >>> x = torch.zeros(1)
    >>> for _ in range(3):
    ...     x, state = residual(x, torch.ones(1), state)
    >>> x.item(), state.momentum.item()
    (4.25, 1.75)
    """

    def __init__(
        self, mu: float = 0.7, gamma: float = 1.0, *, lookahead: float = 0.0, learnable: bool = False
    ) -> None:
        super().__init__()
        _check_mu_and_gamma(mu, gamma)
        if learnable and mu == 0:
            raise ValueError("mu=0 cannot be learned: it is a sigmoid's end; start it above, such as at 0.5")
        self.lookahead = lookahead
        self._mu, self._gamma = mu, gamma
        self.mu_logit = nn.Parameter(torch.tensor(math.log(mu / (1 - mu)))) if learnable else None
        self.log_gamma = nn.Parameter(torch.tensor(math.log(gamma))) if learnable else None

    @property
    def mu(self) -> Tensor | float:
        """μ as it is now."""
        return self._mu if self.mu_logit is None else self.mu_logit.sigmoid()

    @property
    def gamma(self) -> Tensor | float:
        """γ as it is now."""
        return self._gamma if self.log_gamma is None else self.log_gamma.exp()

    def point(self, x: Tensor, state: DepthState | None) -> Tensor:
        if state is None or self.lookahead == 0:
            return x
        _check_shape(x, state)
        return x + self.lookahead * self.gamma * state.momentum

    def forward(self, x: Tensor, update: Tensor, state: DepthState | None) -> tuple[Tensor, DepthState]:
        state = _next_momentum(update, state, self.mu)
        return x + self.gamma * state.momentum, state

    def extra_repr(self) -> str:
        numbers = f"mu={float(self.mu):.3g}, gamma={float(self.gamma):.3g}, lookahead={self.lookahead:.3g}"
        return numbers if self.mu_logit is None else f"{numbers}, learnable=True"


class AdamResidual(nn.Module):
    """Adam over depth: m ← β₁ m + (1 - β₁) u, v ← β₂ v + (1 - β₂) u², then (1 - decay) x + γ m / √(v + ε).

    The moments are over layers, not over training steps. Heavy-ball momentum is accumulated beside them, for
    layers after this one: the paper's models have Adam in the first layer only.

    Without bias correction, which is the paper's form, the first layer's step is γ (1 - β₁) / √(1 - β₂) =
    3.16 γ times the sign of u, wherever |u| is well above √(ε / (1 - β₂)) = 0.003: next to no gradient
    passes. With it, the step is γ times the sign.

    Args:
        gamma: γ > 0.
        mu: μ of the heavy-ball momentum that is handed on.
        betas: β₁ and β₂, each 0 ≤ β < 1.
        eps: ε > 0, under the root.
        decay: share of x that is taken away (decoupled weight decay), 0 ≤ decay ≤ 1. At 1 the layer's input
            is left out, as in the paper's language models.
        bias_correction: divide the moments by 1 - βⁿ, with n the Adam layers so far.

    Raises:
        ValueError: an argument out of range; from forward, a state of another shape.

    Source: Teo and Nguyen 2024 (AdamSMoE, arXiv 2410.14574); Kingma and Ba 2014.

    >>> residual = AdamResidual(gamma=0.1, bias_correction=True)
    >>> x, state = residual(torch.zeros(2), torch.tensor([5.0, -2.0]), None)
    >>> [round(v, 3) for v in x.tolist()]
    [0.1, -0.1]
    """

    def __init__(
        self,
        gamma: float = 1.0,
        *,
        mu: float = 0.7,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 0.0,
        bias_correction: bool = False,
    ) -> None:
        super().__init__()
        _check_mu_and_gamma(mu, gamma)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}; each should lie in 0 ≤ beta < 1")
        if eps <= 0 or not 0 <= decay <= 1:
            raise ValueError(f"eps={eps}, decay={decay}; should be eps > 0 and 0 ≤ decay ≤ 1")
        self.gamma, self.mu, self.betas, self.eps, self.decay = gamma, mu, betas, eps, decay
        self.bias_correction = bias_correction

    def point(self, x: Tensor, state: DepthState | None) -> Tensor:
        return x

    def forward(self, x: Tensor, update: Tensor, state: DepthState | None) -> tuple[Tensor, DepthState]:
        state = _next_momentum(update, state, self.mu)
        (beta_1, beta_2), u, layers = self.betas, wide(update), state.adam_layers + 1  # u² underflows in fp16
        mean, square = (1 - beta_1) * u, (1 - beta_2) * u.square()
        if state.mean is not None and state.square is not None:
            mean, square = mean + beta_1 * state.mean, square + beta_2 * state.square
        state = DepthState(state.momentum, mean, square, layers)
        if self.bias_correction:
            mean, square = mean / (1 - beta_1**layers), square / (1 - beta_2**layers)
        step = self.gamma * mean * (square + self.eps).rsqrt()
        return (1 - self.decay) * x + step.to(x.dtype), state

    def extra_repr(self) -> str:
        return f"gamma={self.gamma:g}, betas={self.betas}, decay={self.decay:g}"


def robust_momentum(rho: float = 0.8, smoothness: float = 1.0, condition: float = 10.0) -> MomentumResidual:
    """The robust momentum method over depth: for updates that are gradients with relative noise.

    With y = x + g (x - x₋₁), where the update is computed: x + b (x - x₋₁) + a u(y), and

        a = κ (1 - ρ)² (1 + ρ) / L,  b = κ ρ³ / (κ - 1),  g = ρ³ / ((κ - 1) (1 - ρ)² (1 + ρ)).

    ρ trades speed for robustness: 1 - 1/√κ is the fastest, 1 - 1/κ the most robust. In a stack of these
    residuals x - x₋₁ is γ p: what attention adds to x between two of them is left out.

    Args:
        rho: ρ, 1 - 1/√κ ≤ ρ ≤ 1 - 1/κ, the rate of convergence.
        smoothness: L > 0, the largest curvature.
        condition: κ > 1, the condition number.

    Returns: `MomentumResidual` with γ = a, μ = b and a lookahead of g.

    Raises:
        ValueError: an argument out of range.

    Source: Cyrus et al. 2018 (robust momentum), eq. 3; as used by Teo and Nguyen 2024, section 4.

    >>> robust_momentum(rho=0.75, smoothness=1.0, condition=10.0)
    MomentumResidual(mu=0.469, gamma=1.09, lookahead=0.429)
    """
    if condition <= 1 or smoothness <= 0:
        raise ValueError(f"condition={condition}, smoothness={smoothness}; should be > 1 and > 0")
    slowest, fastest = 1 - 1 / condition, 1 - condition**-0.5
    if not fastest <= rho <= slowest:
        raise ValueError(
            f"rho={rho}; with condition={condition} it should lie in {fastest:.4g} ≤ rho ≤ {slowest:.4g}"
        )
    shrink = (1 - rho) ** 2 * (1 + rho)
    return MomentumResidual(
        mu=condition * rho**3 / (condition - 1),
        gamma=condition * shrink / smoothness,
        lookahead=rho**3 / ((condition - 1) * shrink),
    )


def _next_momentum(update: Tensor, state: DepthState | None, mu: Tensor | float) -> DepthState:
    if state is None:
        return DepthState(update)
    _check_shape(update, state)
    return state._replace(momentum=mu * state.momentum + update)


def _check_shape(x: Tensor, state: DepthState) -> None:
    if state.momentum.shape != x.shape:
        raise ValueError(
            f"the state across depth has shape {tuple(state.momentum.shape)}, this layer's tokens "
            f"{tuple(x.shape)}: momentum cannot cross to another width; begin there with state None"
        )


def _check_mu_and_gamma(mu: float, gamma: float) -> None:
    if not 0 <= mu < 1:
        raise ValueError(f"mu={mu}; should lie in 0 ≤ mu < 1")
    if not gamma > 0:
        raise ValueError(f"gamma={gamma}; should be > 0")
