"""The published systems that a recipe can name: each function's options are the system's.

A new system is a function here and a line in SYSTEMS. It takes the model's sizes and returns what trains.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from coterie.language import comet_trees as comet
from coterie.language import dynamic_routing as top_p
from coterie.language import graph_of_tokens as tokens
from coterie.language import moe_plus_plus as plus_plus
from coterie.language import momentum_smoe as momentum
from coterie.language import widenet as wide
from coterie.models import Decoder, DecoderConfig
from coterie.nn import LinearScore, MoE, Router, Routing, SwiGLUExperts, TopK
from coterie.train.callbacks import Callback, LossFreeBias, PermutationSearch


@dataclass(frozen=True)
class Method:
    """A decoder, and what its method adds to training.

    Args:
        model: the decoder.
        routing_loss: the method's own loss of the routings; None for Switch's balance loss.
        callbacks: after every step.
    """

    model: Decoder
    routing_loss: Callable[[list[Routing]], Tensor] | None = None
    callbacks: Sequence[Callback] = ()


def alf_lb(config: DecoderConfig, *, rate: float = 1e-3, gate: str = "sigmoid") -> Method:
    """Top-k with selection biases that move towards balance, and no balance loss."""

    def make(layer: int) -> nn.Module:
        select = TopK(config.top_k, gate=gate, bias=torch.zeros(config.num_experts))
        router = Router(LinearScore(config.dim, config.num_experts), select)
        return MoE(router, SwiGLUExperts(config.num_experts, config.dim, config.expert_hidden))

    return Method(Decoder(config, make), routing_loss=_none, callbacks=[LossFreeBias(rate)])


def comet_trees(
    config: DecoderConfig, *, gamma: float = 1.0, weight: float = 0.1, search_steps: int = 0
) -> Method:
    """Smooth-step trees; `search_steps` of permutation-based local search make it COMET+."""
    model = Decoder(config, comet.make_ffn(config, gamma=gamma, local_search=search_steps > 0))

    def loss(routings: list[Routing]) -> Tensor:
        return comet.routing_loss(routings, weight=weight) + comet.permutation_loss(model)

    return Method(model, loss, [PermutationSearch(search_steps)] if search_steps else [])


def dynamic_routing(
    config: DecoderConfig,
    *,
    p: float | Sequence[float] = 0.4,
    max_k: int | None = None,
    alpha: float = 1e-2,
    beta: float = 1e-2,
) -> Method:
    """Top-p with the entropy loss."""
    model = Decoder(config, top_p.make_ffn(config, p, max_k=max_k))
    return Method(model, partial(top_p.routing_loss, alpha=alpha, beta=beta))


def graph_of_tokens(
    config: DecoderConfig,
    *,
    affinity: Literal["similarity", "attention"] = "similarity",
    tau: float | None = None,
    heads: Literal["mean", "learned", "posterior"] = "mean",
    detach: bool = False,
) -> Method:
    """Tokens that choose their experts together, by similarity or by attention."""
    return Method(Decoder(config, tokens.make_ffn(config, affinity, tau=tau, heads=heads, detach=detach)))


def moe_plus_plus(
    config: DecoderConfig,
    *,
    zero: int = 1,
    copy: int = 1,
    constant: int = 2,
    tau: float = 0.75,
    capacity_factor: float | None = 1.1,
    gating_residual: bool = True,
    beta: float = 0.01,
) -> Method:
    """Zero-cost experts beside the feed-forward ones, logits handed from layer to layer."""
    make = plus_plus.make_ffn(
        config,
        zero=zero,
        copy=copy,
        constant=constant,
        tau=tau,
        capacity_factor=capacity_factor,
        gating_residual=gating_residual,
    )
    loss = partial(plus_plus.routing_loss, num_ffn=config.num_experts, tau=tau, beta=beta)
    return Method(Decoder(config, make), loss)


def momentum_smoe(
    config: DecoderConfig,
    *,
    kind: Literal["smoe", "momentum", "adam", "robust"] = "momentum",
    mu: float = 0.7,
    gamma: float = 0.3,
    adam_gamma: float = 0.1,
    learnable: bool = False,
) -> Method:
    """Momentum over depth."""
    residual = momentum.make_residual(
        config.layers, kind, mu=mu, gamma=gamma, adam_gamma=adam_gamma, learnable=learnable
    )
    return Method(Decoder(config, momentum.make_ffn(config), residual))


def widenet(config: DecoderConfig, *, capacity_factor: float | None = 1.2, alpha: float = 0.01) -> Method:
    """One block at every depth, with norms of its own at each; weights are not renormalised."""
    model = wide.widenet_decoder(replace(config, renormalize=False), capacity_factor=capacity_factor)
    return Method(model, partial(wide.routing_loss, alpha=alpha))


def _none(routings: list[Routing]) -> Tensor:
    return routings[0].scores.new_zeros(())


SYSTEMS: dict[str, Callable[..., Method]] = {
    "alf-lb": alf_lb,
    "comet-trees": comet_trees,
    "dynamic-routing": dynamic_routing,
    "graph-of-tokens": graph_of_tokens,
    "moe-plus-plus": moe_plus_plus,
    "momentum-smoe": momentum_smoe,
    "widenet": widenet,
}
