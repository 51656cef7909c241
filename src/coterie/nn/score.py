"""The first step of a router: how well does each expert suit each token? Tokens in, logits out.

A scorer is any module with `dim` (None when it takes any width), `num_experts` and
`forward(x_TD, **context) -> logits_TE`. Wrappers take a scorer and are one themselves, so they compose:
`LogitNoise(PreviousLogits(LinearScore(64, 8)), std=0.1)`.

Everything here computes in float32 (float64 when given that): a bfloat16 gate flips experts.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.kernels.activations import get_activation
from coterie.nn.routing import Routing


class Scorer(Protocol):
    """Tokens to logits."""

    @property
    def dim(self) -> int | None: ...
    @property
    def num_experts(self) -> int: ...

    def __call__(self, x_TD: Tensor, **context: Any) -> Tensor: ...


class LinearScore(nn.Module):
    """logits = x Wᵀ (+ b).

    Args:
        dim: width D of a token.
        num_experts: E.
        bias: learn a bias per expert.

    Source: Shazeer et al. 2017, section 2.1.

    >>> LinearScore(4, 3)(torch.randn(5, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, dim: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__()
        self.dim, self.num_experts = dim, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x_TD: Tensor, **context: Any) -> Tensor:
        x_TD = wide(x_TD)
        return F.linear(x_TD, self.weight.to(x_TD), None if self.bias is None else self.bias.to(x_TD))


class CosineScore(nn.Module):
    """logits = cos(x P, prototype of the expert) / temperature, with a learned temperature.

    Args:
        dim: D.
        num_experts: E.
        proj_dim: width of the space in which angles are taken; None takes them in the token's own.
        temperature: its initial value, > 0.

    Source: Chi et al. 2022 (X-MoE), section 3.2.

    >>> CosineScore(4, 3, temperature=0.5)(torch.randn(5, 4)).abs().max() <= 2.0
    tensor(True)
    """

    def __init__(
        self, dim: int, num_experts: int, *, proj_dim: int | None = None, temperature: float = 0.07
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}; should be > 0")
        self.dim, self.num_experts = dim, num_experts
        self.project = None if proj_dim is None else nn.Linear(dim, proj_dim, bias=False)
        self.prototypes = nn.Parameter(torch.randn(num_experts, proj_dim or dim))
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    def forward(self, x_TD: Tensor, **context: Any) -> Tensor:
        x_TD = wide(x_TD)
        if self.project is not None:
            x_TD = F.linear(x_TD, self.project.weight.to(x_TD))
        cosine_TE = F.normalize(x_TD, dim=-1) @ F.normalize(self.prototypes.to(x_TD), dim=-1).t()
        return cosine_TE / self.log_temperature.to(x_TD).exp()


class MLPScore(nn.Module):
    """A two-layer scorer: logits = W₂ act(W₁ x + b₁).

    Args:
        dim: D.
        num_experts: E.
        hidden: width of the layer between.
        activation: a name in `coterie.kernels.ACTIVATIONS`.

    >>> MLPScore(4, 3, hidden=8)(torch.randn(5, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, dim: int, num_experts: int, *, hidden: int, activation: str = "tanh") -> None:
        super().__init__()
        self.dim, self.num_experts = dim, num_experts
        self.activation = get_activation(activation)
        self.inner = nn.Linear(dim, hidden)
        self.outer = nn.Linear(hidden, num_experts, bias=False)

    def forward(self, x_TD: Tensor, **context: Any) -> Tensor:
        x_TD = wide(x_TD)
        hidden = self.activation(F.linear(x_TD, self.inner.weight.to(x_TD), self.inner.bias.to(x_TD)))
        return F.linear(hidden, self.outer.weight.to(x_TD))


class _Wrapper(nn.Module):
    """A scorer around a scorer: the same widths unless it says otherwise."""

    def __init__(self, score: Scorer) -> None:
        super().__init__()
        self.score = score
        self.dim, self.num_experts = score.dim, score.num_experts


class LogitNoise(_Wrapper):
    """Adds normal noise of standard deviation `std` to the logits while training."""

    def __init__(self, score: Scorer, std: float) -> None:
        super().__init__(score)
        self.std = std

    def forward(self, x_TD: Tensor, **context: Any) -> Tensor:
        logits_TE = self.score(x_TD, **context)
        return logits_TE + self.std * torch.randn_like(logits_TE) if self.training else logits_TE


class InputJitter(_Wrapper):
    """Multiplies the tokens the router sees by uniform noise in 1 ± eps while training.

    Source: Fedus et al. 2021 (Switch), section 2.2.
    """

    def __init__(self, score: Scorer, eps: float = 0.01) -> None:
        super().__init__(score)
        if not 0 <= eps < 1:
            raise ValueError(f"eps={eps}; should lie in 0 ≤ eps < 1")
        self.eps = eps

    def forward(self, x_TD: Tensor, **context: Any) -> Tensor:
        if self.training:
            x_TD = wide(x_TD)
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.eps, 1 + self.eps)
        return self.score(x_TD, **context)


class PreviousLogits(_Wrapper):
    """Adds a learned linear map of the previous MoE layer's logits (gating residual).

    Reads `previous: Routing` from the context; without one (the first layer) the logits stay as they are.
    The map starts at zero, so training starts from the plain router.

    Args:
        score: the scorer to add to.
        previous_experts: number of experts of the previous layer, when it differs.

    Source: Jin et al. 2024 (MoE++), section 3.3.
    """

    def __init__(self, score: Scorer, previous_experts: int | None = None) -> None:
        super().__init__(score)
        self.weight = nn.Parameter(torch.zeros(score.num_experts, previous_experts or score.num_experts))

    def forward(self, x_TD: Tensor, *, previous: Routing | None = None, **context: Any) -> Tensor:
        logits_TE = self.score(x_TD, previous=previous, **context)
        if previous is None:
            return logits_TE
        if previous.num_experts != self.weight.shape[1]:
            raise ValueError(
                f"the previous layer routed over {previous.num_experts} experts but this scorer maps "
                f"{self.weight.shape[1]}; give previous_experts={previous.num_experts}"
            )
        # an expert that could not be chosen says nothing; its -inf times a weight would be NaN
        previous_TE = previous.logits.masked_fill(previous.logits == -torch.inf, 0)
        return logits_TE + F.linear(previous_TE.to(logits_TE), self.weight.to(logits_TE))


class ReferenceExpert(_Wrapper):
    """One more expert, in front, whose logit is always 0: the reference category of a multinomial logit.

    A softmax over free logits has one set of parameters too many; with a reference there is one optimum, and
    an inner logit reads as the log odds of its expert against the reference.

    >>> ReferenceExpert(LinearScore(4, 2))(torch.randn(5, 4))[:, 0].tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0]
    """

    def __init__(self, score: Scorer) -> None:
        super().__init__(score)
        self.num_experts = score.num_experts + 1

    def forward(self, x_TD: Tensor, **context: Any) -> Tensor:
        return F.pad(self.score(x_TD, **context), (1, 0))


class PermuteExperts(_Wrapper):
    """Relabels experts: expert `permutation[i]` of the inner scorer is expert i here."""

    permutation: Tensor

    def __init__(self, score: Scorer, permutation: Tensor) -> None:
        super().__init__(score)
        if sorted(permutation.tolist()) != list(range(score.num_experts)):
            raise ValueError(
                f"permutation={permutation.tolist()} is not a reordering of 0 … {score.num_experts - 1}"
            )
        self.register_buffer("permutation", permutation.clone())

    def forward(self, x_TD: Tensor, **context: Any) -> Tensor:
        return self.score(x_TD, **context).index_select(-1, self.permutation)


class RemapScores(_Wrapper):
    """Sends routing mass from E inner experts to E′: scores′ = M · softmax(logits).

    Returns log(scores′), so that a softmax gate afterwards sees them (normalised, if the columns of M do
    not sum to one).

    Args:
        score: the inner scorer, E experts.
        matrix: M [E′, E], entries ≥ 0.

    Source: DERN (2025, arXiv 2509.10377), router transfer.
    """

    matrix: Tensor

    def __init__(self, score: Scorer, matrix: Tensor) -> None:
        super().__init__(score)
        if matrix.dim() != 2 or matrix.shape[1] != score.num_experts:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}; should be [E′, {score.num_experts}]")
        if bool((matrix < 0).any()):
            raise ValueError(f"matrix holds {float(matrix.min())}; entries should be ≥ 0")
        self.register_buffer("matrix", matrix.clone())
        self.num_experts = matrix.shape[0]

    def forward(self, x_TD: Tensor, **context: Any) -> Tensor:
        scores_TE = self.score(x_TD, **context).softmax(-1)
        return _log(scores_TE @ self.matrix.to(scores_TE).t())


class MaskExperts(_Wrapper):
    """Keeps the router from choosing some experts: their logits become -inf before selection.

    A token for which the inner scorer itself leaves no other expert (a certain tree) goes to all allowed ones
    alike.

    Args:
        score: the inner scorer.
        allowed: bool [E], at least one True.
    """

    allowed: Tensor

    def __init__(self, score: Scorer, allowed: Tensor) -> None:
        super().__init__(score)
        if allowed.shape != (score.num_experts,) or not bool(allowed.any()):
            raise ValueError(
                f"allowed has shape {tuple(allowed.shape)} and {int(allowed.sum())} experts; "
                f"should be [{score.num_experts}] with at least one"
            )
        self.register_buffer("allowed", allowed.bool())

    def forward(self, x_TD: Tensor, **context: Any) -> Tensor:
        logits_TE = self.score(x_TD, **context).masked_fill(~self.allowed, -torch.inf)
        stranded_T1 = (logits_TE == -torch.inf).all(-1, keepdim=True)
        return logits_TE.masked_fill(stranded_T1 & self.allowed, 0)


def wide(x: Tensor) -> Tensor:
    """At least float32, as every gate computes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log(scores: Tensor) -> Tensor:
    return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
