"""Graph of tokens: a token's experts are chosen by its router scores averaged with those of its neighbours.

Tokens that are routed one by one hop between experts late in training, and flip under a little noise. Here
they vote: the scores are averaged by the similarity of tokens, or by the attention of the layer, and top-k
chooses from the average. `StabilityTracker` measures what it is for: fluctuation, flips under noise, entropy.

Any other scorer takes the place of the linear one in `Router(MixTokens(score, affinity), TopK(k))`.

Source: Nguyen et al. 2025 (graph of tokens, arXiv 2505.00792).
"""

from collections.abc import Callable
from typing import Literal

from torch import nn

from coterie.models import DecoderConfig
from coterie.nn import (
    AttentionAffinity,
    Experts,
    LinearScore,
    MixTokens,
    MoE,
    Router,
    SimilarityAffinity,
    SwiGLUExperts,
    TopK,
)
from coterie.nn.affinity import Affinity


def graph_of_tokens(
    experts: Experts, dim: int, affinity: Affinity, *, top_k: int = 2, detach: bool = False
) -> MoE:
    """An MoE layer whose tokens share their decisions: softmax, average by the affinity, top-k.

    The k weights are renormalised for k > 1; a single expert's weight is its averaged probability, through
    which the router learns. The routing's scores are the averaged ones, so that a balance loss balances what
    is used.

    Args:
        experts: the bank.
        dim: D.
        affinity: whom a token listens to: `SimilarityAffinity` or `AttentionAffinity`.
        top_k: experts per token.
        detach: no gradient through the affinity.

    >>> import torch
    >>> layer = graph_of_tokens(SwiGLUExperts(4, 16, 32), 16, SimilarityAffinity(16, causal=False))
    >>> y, routing = layer(torch.randn(2, 5, 16))
    >>> y.shape, routing.load.sum().item()
    (torch.Size([2, 5, 16]), 20)
    """
    score = MixTokens(LinearScore(dim, experts.num_experts), affinity, detach=detach)
    return MoE(Router(score, TopK(top_k, renormalize=top_k > 1)), experts)


def make_ffn(
    config: DecoderConfig,
    affinity: Literal["similarity", "attention"] = "similarity",
    *,
    tau: float | None = None,
    heads: Literal["mean", "learned", "posterior"] = "mean",
    detach: bool = False,
) -> Callable[[int], nn.Module]:
    """Layers for the reference decoder: `Decoder(config, make_ffn(config, "attention"))`. Always causal.

    Generation with a cache routes as a full forward pass does.

    Args:
        config: `num_experts`, `top_k` and `expert_hidden` hold; `renormalize` does not, see
            `graph_of_tokens`.
        affinity: "similarity", a learned one in each layer, or "attention", that of the layer.
        tau: of the similarity; None for √D.
        heads: how the attention's heads become one matrix, see `AttentionAffinity`.
        detach: no gradient through the affinity.

    Raises:
        ValueError: an affinity of another name; tau for "attention" or heads for "similarity"; tau ≤ 0.

    >>> import torch
    >>> from coterie.models import Decoder
    >>> config = DecoderConfig(257, dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, hidden=64,
    ...                        num_experts=4, top_k=2, expert_hidden=32)
    >>> logits, routings = Decoder(config, make_ffn(config, "attention"))(torch.randint(257, (3, 10)))
    >>> [int(routing.load.sum()) for routing in routings]
    [60, 60]
    """

    def listen() -> Affinity:
        if affinity == "similarity" and heads == "mean":
            return SimilarityAffinity(config.dim, causal=True, tau=tau)
        if affinity == "attention" and tau is None:
            return AttentionAffinity(config.heads, heads=heads)
        raise ValueError(
            f'affinity={affinity!r} with tau={tau} and heads={heads!r}; use "similarity", which takes tau, '
            'or "attention", which takes heads'
        )

    listen()  # what does not fit fails here

    def make(layer: int) -> nn.Module:
        bank = SwiGLUExperts(config.num_experts, config.dim, config.expert_hidden)
        return graph_of_tokens(bank, config.dim, listen(), top_k=config.top_k, detach=detach)

    return make
