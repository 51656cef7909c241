"""Gates that are sparse without a top-k: smooth-step trees, and the selectors of DSelect-k.

A tree sends a token from its root to its leaves, one leaf per expert, with a probability at every split. The
smooth-step function makes these exactly 0 or 1 away from the split, so that whole subtrees get exactly
nothing. Both gates here are scorers: an expert that no tree reaches has the logit -inf, and every wrapper and
selection takes them. `TreeRouter` adds what their loss looks at, the probabilities of the paths.

Letters besides those of `coterie.nn.routing`: J trees or selectors, S splits of a tree (E - 1).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from coterie.nn.routers import Router, Select, check_tokens
from coterie.nn.routing import Routing
from coterie.nn.score import Scorer, wide
from coterie.nn.select import Dense


class TreeRouter(nn.Module):
    """A router over trees: what `Router` does, with the path probabilities on the Routing.

    `balance.path_entropy` of the routing drives every tree to a single leaf, and so a token to at most k
    experts; before that has happened it goes to more.

    Args:
        score: a `TreeScore` or `DSelectKScore`, or wrappers around one, such as `PreviousLogits`.
        select: logits to a Routing; None for `Dense()`, which uses exactly the experts that a tree reaches.
            `TopK(k)` caps their number from the first step.

    Returns (from forward, for x [T, D]): Routing with `paths` [T, J, E].

    Raises ValueError when there is no tree in the scorer, and what `Router` refuses.

    Source: Ibrahim et al. 2023 (COMET), section 3.

    >>> routing = TreeRouter(TreeScore(16, 8, k=2))(torch.randn(5, 16))
    >>> routing.paths.shape, routing.paths.sum(-1).allclose(torch.ones(5, 2))
    (torch.Size([5, 2, 8]), True)
    """

    def __init__(self, score: Scorer, select: Select | None = None) -> None:
        super().__init__()
        self.router = Router(score, Dense() if select is None else select)
        self.num_experts = score.num_experts
        self.trees()  # a scorer without trees fails here, not at the first batch

    def trees(self) -> "TreeScore | DSelectKScore":
        """The scorer inside all wrappers."""
        score: Any = self.router.score
        while not isinstance(score, TreeScore | DSelectKScore):
            if not hasattr(score, "score"):
                raise ValueError(f"{type(score).__name__} holds no trees; give TreeScore or DSelectKScore")
            score = score.score
        return score

    def forward(self, x_TD: Tensor, **context: Any) -> Routing:
        trees = self.trees()
        check_tokens(x_TD, trees.dim)
        with torch.autocast(x_TD.device.type, enabled=False):
            paths_TJE = trees.paths(x_TD)
        # computed once: wrappers hand the context down to the trees
        routing: Routing = self.router(x_TD, paths=paths_TJE, **context)
        return replace(routing, paths=paths_TJE)


class TreeScore(nn.Module):
    """k trees over E experts, joined by one softmax over all their leaves.

    Split q of a tree sends the token left with probability smooth_step(w_q · x + c_q). Leaf i of tree j has
    the logit b_i^j(x), linear in x, and the gate of expert i is Σ_j softmax_{j,i}(b_i^j + log P_i^j), P being
    the probability of the path. An expert's logit is the log of that sum, before normalising; -inf where
    every tree gives it exactly nothing.

    The tree is complete, numbered as a heap (children of q: 2q + 1, 2q + 2), so that any E ≥ 2 works. Leaf i,
    node E - 1 + i, is expert i.

    Args:
        dim: width D of a token.
        num_experts: E, at least 2.
        k: trees J, 1 ≤ k ≤ E: the most experts of a token once every tree is certain.
        gamma: width of the window in which a split is undecided, > 0, in the units of w · x; smaller is
            certain sooner. Meant for standardised tokens.

    Weights and biases start at U(-γ/100, γ/100) in splits, all of them near 1/2, and at U(-0.05, 0.05) in
    leaves.

    Raises ValueError for E, k or γ out of range.

    Source: Ibrahim et al. 2023 (COMET), section 3.

    >>> trees = TreeScore(4, 3, k=1)
    >>> _ = trees.split_bias.data.fill_(1.0)  # all splits certain: left
    >>> trees(torch.randn(2, 4)).isfinite().tolist()
    [[False, True, False], [False, True, False]]
    """

    keeps_init = True

    def __init__(self, dim: int, num_experts: int, k: int, *, gamma: float = 1.0) -> None:
        super().__init__()
        _check(num_experts, k, gamma)
        self.dim, self.num_experts, self.k, self.gamma = dim, num_experts, k, gamma
        self.split_weight = _uniform(gamma / 100, k, num_experts - 1, dim)
        self.split_bias = _uniform(gamma / 100, k, num_experts - 1)
        self.leaf_weight = _uniform(0.05, k, num_experts, dim)
        self.leaf_bias = _uniform(0.05, k, num_experts)

    def paths(self, x_TD: Tensor) -> Tensor:
        """[T, J, E]: the probability that tree j sends the token to leaf i; sums to 1 over leaves."""
        x_TD = wide(x_TD)
        left_TJS = smooth_step(_linear(x_TD, self.split_weight, self.split_bias), self.gamma)
        level, leaves = torch.ones_like(left_TJS[..., :1]), []  # the nodes of one depth, in order
        first, splits = 0, left_TJS.shape[-1]
        while first < splits:
            inner = min(level.shape[-1], splits - first)  # the last levels hold leaves beside splits
            leaves.append(level[..., inner:])
            node, left = level[..., :inner], left_TJS[..., first : first + inner]
            level = torch.stack((node * left, node * (1 - left)), dim=-1).flatten(-2)
            first += inner
        return torch.cat([*leaves, level], dim=-1)

    def forward(self, x_TD: Tensor, *, paths: Tensor | None = None, **context: Any) -> Tensor:
        paths_TJE = self.paths(x_TD) if paths is None else paths
        return _join(_linear(wide(x_TD), self.leaf_weight, self.leaf_bias), paths_TJE)


class DSelectKScore(nn.Module):
    """k selectors, each of which spells the number of its expert in bits that a smooth-step decides.

    Selector j sets bit m with probability smooth_step(w · x + c), and so chooses expert i with probability
    P_i^j, the product over its bits; the gate is Σ_j softmax_j(a_j(x)) P_i^j.

    Args:
        dim: width D of a token.
        num_experts: E, a power of 2.
        k: selectors J, 1 ≤ k ≤ E.
        gamma: as in `TreeScore`.

    Raises ValueError for E, k or γ out of range.

    Source: Hazimeh et al. 2021 (DSelect-k), section 3, per-example gating.

    >>> DSelectKScore(4, 8, k=2)(torch.randn(5, 4)).shape
    torch.Size([5, 8])
    """

    keeps_init = True

    def __init__(self, dim: int, num_experts: int, k: int, *, gamma: float = 1.0) -> None:
        super().__init__()
        _check(num_experts, k, gamma)
        if num_experts & (num_experts - 1):
            raise ValueError(
                f"num_experts={num_experts} is not a power of 2; DSelect-k numbers experts in bits: "
                "use TreeScore, which takes any number"
            )
        self.dim, self.num_experts, self.k, self.gamma = dim, num_experts, k, gamma
        bits = num_experts.bit_length() - 1
        self.bit_weight = _uniform(gamma / 100, k, bits, dim)
        self.bit_bias = _uniform(gamma / 100, k, bits)
        self.selector_weight = _uniform(0.05, k, 1, dim)
        self.selector_bias = _uniform(0.05, k, 1)

    def paths(self, x_TD: Tensor) -> Tensor:
        """[T, J, E]: the probability that selector j chooses expert i."""
        set_TJM = smooth_step(_linear(wide(x_TD), self.bit_weight, self.bit_bias), self.gamma)
        paths = torch.ones_like(set_TJM[..., :1])
        for bit in set_TJM.unsqueeze(-1).unbind(-2):  # most significant bit first
            paths = torch.stack((paths * (1 - bit), paths * bit), dim=-1).flatten(-2)
        return paths

    def forward(self, x_TD: Tensor, *, paths: Tensor | None = None, **context: Any) -> Tensor:
        paths_TJE = self.paths(x_TD) if paths is None else paths
        return _join(_linear(wide(x_TD), self.selector_weight, self.selector_bias), paths_TJE)


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """A cubic from exactly 0 at t ≤ -γ/2 to exactly 1 at t ≥ γ/2: -2 (t/γ)³ + 3/2 (t/γ) + 1/2 between.

    Source: Hazimeh et al. 2020 (the tree ensemble layer), equation 1.

    >>> smooth_step(torch.tensor([-0.5, -0.25, 0.0, 0.5]), gamma=1.0).tolist()
    [0.0, 0.15625, 0.5, 1.0]
    """
    u = (t / gamma + 0.5).clamp(0, 1)
    return u * u * (3 - 2 * u)  # the same cubic in u, without rounding at its ends


def _join(logits_TJE: Tensor, paths_TJE: Tensor) -> Tensor:
    """log Σ_j P exp(logit): its softmax over experts is one joint softmax over all (tree, leaf) pairs."""
    dead_TJE = paths_TJE == 0
    joint_TJE = logits_TJE + (paths_TJE.masked_fill(dead_TJE, 1) + 1e-8).log()
    # every -inf comes in after the last log, whose gradient it would make NaN
    unreached_TE = dead_TJE.all(1)
    hidden_TJE = dead_TJE & ~unreached_TE.unsqueeze(1)
    reached_TE: Tensor = joint_TJE.masked_fill(hidden_TJE, -torch.inf).logsumexp(1)
    return reached_TE.masked_fill(unreached_TE, -torch.inf)


def _linear(x_TD: Tensor, weight_JND: Tensor, bias_JN: Tensor) -> Tensor:
    return torch.einsum("td,jnd->tjn", x_TD, weight_JND.to(x_TD)) + bias_JN.to(x_TD)


def _uniform(bound: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _check(num_experts: int, k: int, gamma: float) -> None:
    if num_experts < 2:
        raise ValueError(f"num_experts={num_experts}; a tree needs at least 2 leaves")
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} trees over {num_experts} experts; use 1 ≤ k ≤ {num_experts}")
    if not gamma > 0:
        raise ValueError(f"gamma={gamma}; should be > 0, such as 1.0 for standardised tokens")
