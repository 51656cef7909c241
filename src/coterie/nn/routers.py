"""Routers: tokens in, `Routing` out. Most are a scorer and a selection put together by `Router`.

What a router may look at besides the token comes as keyword context; the keys in use:

    mask       [T] bool, False for padding
    shape      leading shape of the layer's input, such as (B, S); given by `MoE`
    previous   the Routing of the previous MoE layer
    token_ids  [T] int64
    segment_ids  [T] int64, the document of each token where a row packs several
    affinity   [B, S, S] how much each token listens to each other one
    attention  `AttentionHeads` of the layer: its attention probabilities, computed only if a router asks
    past       dict in which a router keeps tensors of earlier positions; given when decoding with a cache
    paths      [T, J, E] path probabilities, from `TreeRouter` to its scorer
"""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.nn.routing import Routing
from coterie.nn.score import InputJitter, LinearScore, Scorer, wide
from coterie.nn.select import TopK, check_top_k, make_routing


class Select(Protocol):
    """Logits to a Routing."""

    def __call__(self, logits_TE: Tensor, *, mask: Tensor | None = None) -> Routing: ...


class AnyRouter(Protocol):
    """Anything that routes."""

    @property
    def num_experts(self) -> int: ...

    def __call__(self, x_TD: Tensor, **context: Any) -> Routing: ...


class Router(nn.Module):
    """A scorer and a selection.

    Args:
        score: tokens to logits, such as `LinearScore(64, 8)`.
        select: logits to a Routing, such as `TopK(2)`.

    Raises ValueError on construction when they do not fit (a k above E), and on call for integer tokens,
    a wrong width, or NaN logits.

    >>> router = Router(LinearScore(16, 8), TopK(2))
    >>> router(torch.randn(5, 16)).experts.shape
    torch.Size([5, 2])
    """

    def __init__(self, score: Scorer, select: Select) -> None:
        super().__init__()
        self.score, self.select = score, select
        select(torch.zeros(0, score.num_experts))  # what does not fit fails here, not at the first batch

    @property
    def num_experts(self) -> int:  # the scorer may grow
        return self.score.num_experts

    def forward(self, x_TD: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        check_tokens(x_TD, self.score.dim)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.score(x_TD, mask=mask, **context)
            if mask is not None:
                logits_TE = logits_TE.masked_fill(~mask.unsqueeze(1), 0)
            check_logits(logits_TE)
            return self.select(logits_TE, mask=mask)


def switch_router(dim: int, num_experts: int, *, jitter: float = 0.01) -> Router:
    """One expert per token, weighted by its probability; jittered input while training.

    Source: Fedus et al. 2021 (Switch), section 2.

    >>> switch_router(16, 4)(torch.randn(5, 16)).experts.shape
    torch.Size([5, 1])
    """
    return Router(InputJitter(LinearScore(dim, num_experts), jitter), TopK(1, renormalize=False))


class NoisyTopK(nn.Module):
    """Top-k over logits with learned noise; fills `choice_probability` for Shazeer's load loss.

    Args:
        dim: D.
        num_experts: E.
        k: experts per token.

    While training, logits get normal noise of standard deviation softplus(x W_noise). Both weight matrices
    start at zero, as in the paper, so that experts start with equal load.

    Source: Shazeer et al. 2017, sections 2.1 and 4, appendix A.

    >>> NoisyTopK(16, 8, k=2)(torch.randn(5, 16)).choice_probability.shape
    torch.Size([5, 8])
    """

    def __init__(self, dim: int, num_experts: int, k: int) -> None:
        super().__init__()
        check_top_k(k, num_experts)
        self.dim, self.num_experts = dim, num_experts
        self.weight = nn.Parameter(torch.zeros(num_experts, dim))
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim))
        self.k = k
        self.select: Select = TopK(k)

    def forward(self, x_TD: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        check_tokens(x_TD, self.dim)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = wide(x_TD)
            clean_TE = F.linear(x_TD, self.weight.to(x_TD))
            if mask is not None:
                clean_TE = clean_TE.masked_fill(~mask.unsqueeze(1), 0)
            check_logits(clean_TE)
            if not self.training:
                return self.select(clean_TE, mask=mask)
            std_TE = F.softplus(F.linear(x_TD, self.noise_weight.to(x_TD))) + 1e-2
            noisy_TE = clean_TE + std_TE * torch.randn_like(clean_TE)
            routing = self.select(noisy_TE, mask=mask)
            probability_TE = self._choice_probability(clean_TE, noisy_TE, std_TE)
            return replace(routing, choice_probability=probability_TE)

    def _choice_probability(self, clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor) -> Tensor:
        k = self.k
        if k == self.num_experts:
            return torch.ones_like(clean_TE)
        # To be chosen, an expert must beat the k-th best of the others: the (k+1)-th best of all for an
        # expert that is in, the k-th best for one that is out.
        best = noisy_TE.topk(k + 1, dim=-1).values
        bar_in, bar_out = best[:, k:], best[:, k - 1 : k]
        bar_TE = torch.where(noisy_TE > bar_in, bar_in, bar_out)
        probability_TE: Tensor = torch.special.ndtr((clean_TE - bar_TE) / std_TE)
        return probability_TE


class HashRouter(nn.Module):
    """Experts fixed per token id: no learning, a strong baseline.

    Args:
        table: int64 [V] or [V, K], the expert(s) of each token id.
        num_experts: E.

    Reads `token_ids` [T] from the context. Weights are 1/K.

    Source: Roller et al. 2021 (hash layers).

    >>> router = HashRouter(torch.tensor([0, 1, 0, 1]), num_experts=2)
    >>> router(torch.zeros(3, 8), token_ids=torch.tensor([3, 0, 2])).experts.tolist()
    [[1], [0], [0]]
    """

    table: Tensor

    def __init__(self, table: Tensor, num_experts: int) -> None:
        super().__init__()
        if int(table.min()) < 0 or int(table.max()) >= num_experts:
            raise ValueError(
                f"table names experts {int(table.min())} … {int(table.max())}; "
                f"should lie in 0 … {num_experts - 1}"
            )
        self.num_experts = num_experts
        self.register_buffer("table", table if table.dim() == 2 else table.unsqueeze(1))

    @classmethod
    def random(cls, vocab_size: int, num_experts: int, k: int = 1, *, seed: int = 0) -> "HashRouter":
        """A random balanced table: each token id gets k distinct experts."""
        check_top_k(k, num_experts)
        generator = torch.Generator().manual_seed(seed)
        ranks = torch.rand(vocab_size, num_experts, generator=generator).argsort(1)
        return cls(ranks[:, :k], num_experts)

    def forward(
        self,
        x_TD: Tensor,
        *,
        token_ids: Tensor | None = None,
        mask: Tensor | None = None,
        **context: Any,
    ) -> Routing:
        if token_ids is None:
            raise ValueError("HashRouter needs token_ids in the context; none were given")
        return _equal_weights(self.table[token_ids], self.num_experts, mask)


class RandomRouter(nn.Module):
    """k distinct experts at random for each token, weights 1/k: the baseline a router must beat.

    >>> RandomRouter(8, k=2)(torch.zeros(3, 16)).slots_per_token.tolist()
    [2, 2, 2]
    """

    def __init__(self, num_experts: int, k: int = 1) -> None:
        super().__init__()
        check_top_k(k, num_experts)
        self.num_experts, self.k = num_experts, k

    def forward(self, x_TD: Tensor, *, mask: Tensor | None = None, **context: Any) -> Routing:
        order = torch.rand(x_TD.shape[0], self.num_experts, device=x_TD.device).argsort(1)
        return _equal_weights(order[:, : self.k], self.num_experts, mask)


def check_tokens(x_TD: Tensor, dim: int | None) -> None:
    """ValueError unless tokens are floating point, [T, dim]."""
    if not x_TD.is_floating_point():
        raise ValueError(f"tokens are {x_TD.dtype}; a router takes floating point (embed token ids first)")
    if x_TD.dim() != 2 or (dim is not None and x_TD.shape[1] != dim):
        raise ValueError(f"tokens have shape {tuple(x_TD.shape)}; this router takes [T, {dim}]")


def check_logits(logits_TE: Tensor) -> None:
    """Stops at NaN, which would make every later choice meaningless. No synchronisation on a GPU."""
    message = "the router's logits hold NaN; look for NaN in its input or its weights"
    if torch.compiler.is_compiling() or logits_TE.device.type != "cpu":
        torch._assert_async(~logits_TE.isnan().any(), message)
    elif bool(logits_TE.isnan().any()):
        raise ValueError(message)


def _equal_weights(experts_TK: Tensor, num_experts: int, mask: Tensor | None) -> Routing:
    used_TK = torch.ones_like(experts_TK, dtype=torch.bool)
    weights_TK = torch.full(experts_TK.shape, 1 / experts_TK.shape[1], device=experts_TK.device)
    scores_TE = weights_TK.new_zeros(experts_TK.shape[0], num_experts).scatter(1, experts_TK, weights_TK)
    return make_routing(experts_TK, weights_TK, used_TK, scores_TE, scores_TE, mask)
