"""MoE++: zero-cost experts beside the feed-forward ones, and logits handed from layer to layer.

A token may spend its k slots on experts that cost nothing, so a mean token uses fewer feed-forward experts
than k; τ says how many. `routing.narrow(0, num_ffn).slots_per_token` says how many each token used.

Source: Jin et al. 2024 (MoE++, arXiv 2410.07348).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from coterie.models import DecoderConfig
from coterie.nn import (
    ConcatExperts,
    Experts,
    LimitCapacity,
    LinearScore,
    MaskWeights,
    MLPScore,
    MoE,
    PreviousLogits,
    Router,
    Routing,
    SwiGLUExperts,
    TopK,
    ZeroCostExperts,
    balance,
)
from coterie.nn.score import Scorer


def moe_plus_plus(
    ffn: Experts,
    dim: int,
    *,
    zero: int = 1,
    copy: int = 1,
    constant: int = 2,
    top_k: int = 2,
    tau: float = 0.75,
    capacity_factor: float | None = 1.1,
    gating_residual: bool = True,
    gate_hidden: int | None = None,
    mask_zero: bool = True,
) -> MoE:
    """An MoE++ layer: the experts of `ffn` first, then constant, copy and zero ones.

    Args:
        ffn: bank of feed-forward experts, such as `SwiGLUExperts(8, dim, hidden)`.
        dim: D.
        zero: how many zero experts; 1 in the paper.
        copy: how many copy experts; 1 in the paper.
        constant: how many constant experts; max(ffn / 4 - 2, 2) in the paper.
        top_k: experts per token, of any kind.
        tau: share of a zero-cost expert's capacity that a feed-forward expert gets, 0.1 … 1 in the paper.
            Smaller is faster: balanced, τ F / (τ F + Z) of the slots go to the F feed-forward experts.
        capacity_factor: while training, slots over this many times the balanced load are dropped (γ); None
            drops none.
        gating_residual: add a map of the previous MoE layer's logits to this one's. In the first layer there
            are none, and the map's parameters would get no gradient: pass False there.
        gate_hidden: width between the two layers of a tanh gate (8 E in the released code); None for a
            linear gate (the paper's formula).
        mask_zero: a chosen zero expert gets weight 0 and its partner the whole (the released code); False
            lets the zero expert's weight scale the partner down.

    Returns: the layer. Its balance loss is `routing_loss` with the same tau.

    Raises:
        ValueError: tau ≤ 0, no zero-cost expert, or what its parts refuse.

    >>> layer = moe_plus_plus(SwiGLUExperts(8, 16, 32), dim=16, tau=0.5)
    >>> y, routing = layer.eval()(torch.randn(100, 16))
    >>> y.shape, routing.num_experts, bool(routing.narrow(0, 8).slots_per_token.double().mean() < 2)
    (torch.Size([100, 16]), 12, True)
    """
    zero_cost = ZeroCostExperts(dim, zero=zero, copy=copy, constant=constant)
    num_ffn, num_experts = ffn.num_experts, ffn.num_experts + zero_cost.num_experts
    score: Scorer = (
        LinearScore(dim, num_experts)
        if gate_hidden is None
        else MLPScore(dim, num_experts, hidden=gate_hidden)
    )
    if gating_residual:
        score = PreviousLogits(score)
    is_zero_E = torch.tensor([False] * num_ffn + [kind == "zero" for kind in zero_cost.kinds])
    select = MaskWeights(TopK(top_k), is_zero_E) if mask_zero and zero else TopK(top_k)
    factors_E = capacity_factors(num_ffn, zero_cost.num_experts, tau, capacity_factor or 1.0)
    router: Router | LimitCapacity = Router(score, select)
    if capacity_factor is not None:
        router = LimitCapacity(router, factors_E, training_only=True)
    return MoE(router, ConcatExperts(ffn, zero_cost))  # type: ignore[arg-type]


def make_ffn(config: DecoderConfig, **options: int | float | bool | None) -> Callable[[int], nn.Module]:
    """MoE++ layers for the reference decoder: `Decoder(config, make_ffn(config, tau=0.5))`.

    Args:
        config: `num_experts` counts the feed-forward experts; `top_k` and `expert_hidden` hold too.
        options: keyword arguments of `moe_plus_plus`.

    >>> from coterie.models import Decoder
    >>> config = DecoderConfig(257, dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, hidden=64,
    ...                        num_experts=4, top_k=2, expert_hidden=32)
    >>> logits, routings = Decoder(config, make_ffn(config, constant=1))(torch.randint(257, (3, 10)))
    >>> [routing.num_experts for routing in routings]
    [7, 7]
    """

    def make(layer: int) -> nn.Module:
        bank = SwiGLUExperts(config.num_experts, config.dim, config.expert_hidden)
        settings = {"top_k": config.top_k, "gating_residual": True, **options}
        settings["gating_residual"] = layer > 0 and settings["gating_residual"]
        return moe_plus_plus(bank, config.dim, **settings)  # type: ignore[arg-type]

    return make


def routing_loss(
    routings: Sequence[Routing], num_ffn: int, *, tau: float = 0.75, beta: float = 0.01
) -> Tensor:
    """β Σ_layers (E / K) Σ_e η_e f_e P_e, with η = 1 for feed-forward experts and τ for zero-cost ones.

    f_e is the share of tokens that chose e and P_e its mean score. The paper has no factor E / K; with it, β
    means what it means in Switch's loss.

    Args:
        routings: one per MoE layer; layers are summed.
        num_ffn: feed-forward experts, the first of the E.
        tau: τ as in `moe_plus_plus`.
        beta: weight of the loss.

    >>> layer = moe_plus_plus(SwiGLUExperts(8, 16, 32), dim=16)
    >>> _, routing = layer(torch.randn(100, 16))
    >>> 0 < routing_loss([routing], num_ffn=8).item() < 0.02
    True
    """
    weights_E = expert_weights(num_ffn, routings[0].num_experts - num_ffn, tau) if routings else None
    return beta * len(routings) * balance.load_balance(routings, expert_weights=weights_E)


def expert_weights(num_ffn: int, num_zero_cost: int, tau: float) -> Tensor:
    """[E]: weight η of each expert in the balance loss, 1 for the first `num_ffn`, τ for the rest.

    >>> expert_weights(2, 1, tau=0.5).tolist()
    [1.0, 1.0, 0.5]
    """
    _check(num_ffn, num_zero_cost, tau)
    return torch.tensor([1.0] * num_ffn + [tau] * num_zero_cost, dtype=torch.float64)


def capacity_factors(num_ffn: int, num_zero_cost: int, tau: float, gamma: float = 1.1) -> Tensor:
    """[E]: capacity of each expert over the mean load, so that the capacities sum to γ times all slots.

    Of S used slots a feed-forward expert takes γ τ S / (τ F + Z), a zero-cost one γ S / (τ F + Z). The paper
    writes tokens where slots are meant: k times fewer would drop half of all choices at k = 2.

    >>> capacity_factors(2, 1, tau=0.5, gamma=1.0).tolist()
    [0.75, 0.75, 1.5]
    """
    _check(num_ffn, num_zero_cost, tau)
    share = gamma * (num_ffn + num_zero_cost) / (tau * num_ffn + num_zero_cost)
    return torch.tensor([tau * share] * num_ffn + [share] * num_zero_cost, dtype=torch.float64)


def _check(num_ffn: int, num_zero_cost: int, tau: float) -> None:
    if tau <= 0:
        raise ValueError(f"tau={tau}; should be > 0, such as 0.75")
    if num_ffn < 1 or num_zero_cost < 1:
        raise ValueError(
            f"{num_ffn} feed-forward and {num_zero_cost} zero-cost experts; MoE++ needs at least one of each"
        )
