"""The parts that a recipe can name: scores, routers and expert banks of `coterie.nn`.

A new one is a line in its table; its options are its arguments.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from coterie.nn import (
    AnyRouter,
    ConcatExperts,
    CosineScore,
    Dense,
    DSelectKScore,
    HashRouter,
    LinearScore,
    MLPExperts,
    MLPScore,
    NoisyTopK,
    RandomRouter,
    Router,
    SwiGLUExperts,
    Threshold,
    TopK,
    TopP,
    TreeScore,
    ZeroCostExperts,
    switch_router,
)


def swiglu_zero_cost(
    num_experts: int, dim: int, hidden: int, *, zero: int = 1, copy: int = 1, constant: int = 2
) -> ConcatExperts:
    """SwiGLU experts, then constant, copy and zero ones.

    >>> swiglu_zero_cost(4, 8, 16).num_experts
    8
    """
    return ConcatExperts(
        SwiGLUExperts(num_experts, dim, hidden),
        ZeroCostExperts(dim, zero=zero, copy=copy, constant=constant),
    )


Part = Callable[..., Any]

SCORES: dict[str, Part] = {
    "linear": LinearScore,
    "mlp": MLPScore,
    "cosine": CosineScore,
    "trees": TreeScore,
    "dselect-k": DSelectKScore,
}

# Expert choice is not here: it looks at later tokens, which a causal model must not.
SELECTIONS: dict[str, Part] = {"top-k": TopK, "top-p": TopP, "threshold": Threshold, "soft": Dense}

WHOLE_ROUTERS: dict[str, Part] = {
    "noisy-top-k": NoisyTopK,
    "switch": switch_router,
    "hash": HashRouter.random,
    "random": RandomRouter,
}

ROUTERS = SELECTIONS | WHOLE_ROUTERS
NEEDS_K = ("top-k", "noisy-top-k")  # k is the model's top_k unless it is given

EXPERTS: dict[str, Part] = {
    "swiglu": SwiGLUExperts,
    "mlp": MLPExperts,
    "swiglu+zero-cost": swiglu_zero_cost,
}

# what the model's sizes say, so that no option has to
GIVEN = ("dim", "num_experts", "hidden", "vocab_size", "dim_out")
GIVEN_TO_SCORES = ("dim", "num_experts")  # an MLP's hidden width is its own


def make_router(
    name: str,
    options: dict[str, Any],
    score: str,
    score_options: dict[str, Any],
    *,
    dim: int,
    num_experts: int,
    vocab_size: int,
) -> AnyRouter:
    """A router by name; a selection gets the named score before it.

    >>> make_router("top-p", {"p": 0.4}, "linear", {}, dim=8, num_experts=4, vocab_size=257).num_experts
    4
    """
    sizes = {"dim": dim, "num_experts": num_experts, "vocab_size": vocab_size}
    if name in WHOLE_ROUTERS:
        return _call(WHOLE_ROUTERS[name], sizes, options)  # type: ignore[no-any-return]
    return Router(_call(SCORES[score], sizes, score_options), SELECTIONS[name](**options))


def make_experts(name: str, options: dict[str, Any], *, num_experts: int, dim: int, hidden: int) -> nn.Module:
    """A bank by name.

    >>> make_experts("mlp", {"activation": "relu"}, num_experts=4, dim=8, hidden=16).activation
    'relu'
    """
    bank: nn.Module = EXPERTS[name](num_experts, dim, hidden, **options)
    return bank


def _call(part: Part, sizes: dict[str, int], options: dict[str, Any]) -> Any:
    wanted = inspect.signature(part).parameters
    return part(**{name: value for name, value in sizes.items() if name in wanted}, **options)
