"""COMET: a sparse gate made of trees, and a local search for the experts behind its leaves.

Each of k trees sends a token to one of its E leaves; certain trees use at most k experts, without a top-k, a
balance loss or noise. COMET+ also learns which expert stands behind which leaf, over the first steps of
training; `PermuteLabels` and `PermutationSearch` do the same for any other router.

Source: Ibrahim et al. 2023 (COMET, KDD 2023).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from coterie.models import DecoderConfig
from coterie.nn import (
    LearnedPermutation,
    MoE,
    PermuteLabels,
    Routing,
    SwiGLUExperts,
    TreeRouter,
    TreeScore,
    balance,
    permutation_entropy,
)


def make_ffn(
    config: DecoderConfig, *, gamma: float = 1.0, local_search: bool = False
) -> Callable[[int], nn.Module]:
    """COMET layers for the reference decoder: `Decoder(config, make_ffn(config))`.

    Train with `routing_loss` beside cross-entropy. With local search, add `permutation_loss`, and give `fit`
    the callback `PermutationSearch(steps)`; every layer learns a permutation of its own.

    Args:
        config: `top_k` is the number of trees, the most experts of a token once the trees are certain.
        gamma: width of the window in which a split is undecided, as in `TreeScore`.
        local_search: learn which expert stands behind which leaf (COMET+).

    >>> from coterie.models import Decoder
    >>> config = DecoderConfig(257, dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, hidden=64,
    ...                        num_experts=6, top_k=2, expert_hidden=32)
    >>> logits, routings = Decoder(config, make_ffn(config))(torch.randint(257, (3, 10)))
    >>> [routing.paths.shape for routing in routings]
    [torch.Size([30, 2, 6]), torch.Size([30, 2, 6])]
    """

    def make(layer: int) -> nn.Module:
        router: TreeRouter | PermuteLabels = TreeRouter(
            TreeScore(config.dim, config.num_experts, config.top_k, gamma=gamma)
        )
        if local_search:
            router = PermuteLabels(router)
        return MoE(router, SwiGLUExperts(config.num_experts, config.dim, config.expert_hidden))

    return make


def routing_loss(routings: Sequence[Routing], *, weight: float = 0.1) -> Tensor:
    """λ Σ_gates (mean entropy of a token's paths, summed over trees), the paper's loss beside the task's.

    Args:
        routings: one per gate, each with `paths`.
        weight: λ. Larger makes trees certain sooner and uses fewer experts; too large, and every token of a
            tree ends in one leaf. 0.001 … 100 in the paper, by data set.

    >>> routing = TreeRouter(TreeScore(16, 8, k=2))(torch.randn(5, 16))
    >>> 0 < routing_loss([routing]).item() <= 0.1 * 2 * torch.tensor(8.0).log().item()
    True
    """
    return weight * len(routings) * balance.path_entropy(routings)


def permutation_loss(model: nn.Module, *, weight: float = 1e-4) -> Tensor:
    """ζ Σ (entropy of each relaxed permutation), over those of the model that are still searched.

    Args:
        model: with `LearnedPermutation` somewhere inside; a shared one counts once.
        weight: ζ.

    >>> router = PermuteLabels(TreeRouter(TreeScore(16, 8, k=2)))
    >>> before = permutation_loss(router).item()
    >>> router.permutation.harden()
    >>> before > 0, permutation_loss(router).item()
    (True, 0.0)
    """
    searched = [m for m in model.modules() if isinstance(m, LearnedPermutation) and not bool(m.hard)]
    return weight * sum((permutation_entropy(m.matrix()) for m in searched), torch.zeros(()))
