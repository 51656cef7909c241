"""WideNet: one block applied at every depth, made wide by experts, with norms of its own at each depth.

Attention, router and experts are stored once, whatever the depth; the saved parameters buy experts. A block's
compute stays: L applications of K experts. Since each depth scales and shifts what the shared router reads, a
token goes to other experts at other depths.

`routings` holds one Routing per depth, so that `Monitor` counts load and drops by depth, and `routing_loss`
charges the one router for every call.

Source: Xue et al. 2021 (WideNet, arXiv 2107.11817), AAAI 2022.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from coterie.models import Decoder, DecoderConfig, ViT, ViTConfig, tie_depth
from coterie.nn import (
    Experts,
    LimitCapacity,
    LinearScore,
    LogitNoise,
    MLPExperts,
    MoE,
    Router,
    Routing,
    SwiGLUExperts,
    TopK,
    balance,
)

SHARED = ("self_attn", "mlp")  # the modules of a layer that are one at all depths; norms are not


def widenet_vit(
    config: ViTConfig, *, num_experts: int = 4, top_k: int = 2, capacity_factor: float | None = 1.2
) -> ViT:
    """WideNet for images: the vision transformer of `config`, tied, its feed-forward part an MoE.

    Args:
        config: `hidden` is the width of each expert.
        num_experts, top_k, capacity_factor: as in `widenet_moe`.

    >>> from coterie.models import count_parameters
    >>> sizes = dict(patch=2, classes=10, dim=24, heads=4, hidden=48, channels=1)
    >>> four, eight = (widenet_vit(ViTConfig((8, 8), layers=depth, **sizes)) for depth in (4, 8))
    >>> count_parameters(eight) - count_parameters(four) == 4 * 4 * 24
    True
    """
    make = make_vit_ffn(config, num_experts=num_experts, top_k=top_k, capacity_factor=capacity_factor)
    model = ViT(config, make)
    tie_depth(model.layers, SHARED)
    return model


def make_vit_ffn(
    config: ViTConfig, *, num_experts: int = 4, top_k: int = 2, capacity_factor: float | None = 1.2
) -> Callable[[int], nn.Module]:
    """WideNet's layers for the vision transformer, one per depth: `tie_depth` makes them one.

    Experts start Glorot-uniform, as in the authors' code, and have the tanh approximation of GELU.

    Args:
        config, num_experts, top_k, capacity_factor: as in `widenet_vit`.

    >>> config = ViTConfig((8, 8), patch=2, classes=10, dim=24, layers=4, heads=4, hidden=48, channels=1)
    >>> untied = ViT(config, make_vit_ffn(config, num_experts=8))
    """

    def make(layer: int) -> nn.Module:
        bank = MLPExperts(num_experts, config.dim, config.hidden, activation="gelu_tanh")
        for matrix in (*bank.up_proj.detach(), *bank.down_proj.detach()):
            nn.init.xavier_uniform_(matrix)
        return widenet_moe(bank, config.dim, top_k=top_k, capacity_factor=capacity_factor)

    return make


def widenet_decoder(config: DecoderConfig, *, capacity_factor: float | None = 1.2) -> Decoder:
    """WideNet as a language model: the reference decoder, tied, with an MoE of SwiGLU experts.

    `language_model_loss(balance=alpha * config.layers)` trains it with the loss of `routing_loss`;
    `save_pretrained` saves it.

    Args:
        config: `num_experts`, `top_k` and `expert_hidden` hold; `renormalize` must be False, as the paper's
            weights are the scores themselves.
        capacity_factor: as in `widenet_moe`.

    >>> config = DecoderConfig(257, dim=32, layers=3, heads=2, kv_heads=1, head_dim=16, hidden=64,
    ...                        num_experts=4, top_k=2, expert_hidden=32, renormalize=False)
    >>> model = widenet_decoder(config)
    >>> model.layers[0].mlp is model.layers[2].mlp, model.layers[0].self_attn is model.layers[2].self_attn
    (True, True)
    """
    model = Decoder(config, make_ffn(config, capacity_factor=capacity_factor))
    tie_depth(model.layers, SHARED)
    return model


def make_ffn(config: DecoderConfig, *, capacity_factor: float | None = 1.2) -> Callable[[int], nn.Module]:
    """WideNet's layers for the reference decoder, one per depth: `tie_depth` makes them one.

    Args:
        config, capacity_factor: as in `widenet_decoder`.

    Raises:
        ValueError: `config.renormalize`, or what `widenet_moe` refuses.

    >>> config = DecoderConfig(257, dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, hidden=64,
    ...                        num_experts=4, top_k=2, expert_hidden=32, renormalize=False)
    >>> model = Decoder(config, make_ffn(config))
    >>> tie_depth(model.layers, SHARED)
    """
    if config.renormalize:
        raise ValueError(
            "the config has renormalize=True; WideNet's weights are not renormalised: pass False"
        )

    def make(layer: int) -> nn.Module:
        bank = SwiGLUExperts(config.num_experts, config.dim, config.expert_hidden)
        return widenet_moe(bank, config.dim, top_k=config.top_k, capacity_factor=capacity_factor)

    return make


def widenet_moe(bank: Experts, dim: int, *, top_k: int = 2, capacity_factor: float | None = 1.2) -> MoE:
    """WideNet's MoE: softmax over all experts, the top k kept with the scores they have.

    While training, the logits get normal noise of standard deviation 1 / E.

    Args:
        bank: of E experts.
        dim: D.
        top_k: K.
        capacity_factor: while training, an expert takes at most this many times its share of the slots of the
            whole batch, first choices first, in the batch's order; a token without a slot goes on by its
            residual alone. None drops nothing.

    Raises:
        ValueError: capacity_factor ≤ 0, or top_k not in 1 … E.

    >>> import torch
    >>> layer = widenet_moe(MLPExperts(4, 16, 32), dim=16)
    >>> y, routing = layer.eval()(torch.randn(10, 16))
    >>> bool((routing.weights.sum(1) < 1).all())
    True
    """
    if capacity_factor is not None and capacity_factor <= 0:
        raise ValueError(f"capacity_factor={capacity_factor}; should be > 0, or None to drop nothing")
    num_experts = bank.num_experts
    score = LogitNoise(LinearScore(dim, num_experts), std=1 / num_experts)
    router: Router | LimitCapacity = Router(score, TopK(top_k, renormalize=False))
    if capacity_factor is not None:
        router = LimitCapacity(router, capacity_factor, training_only=True)
    return MoE(router, bank)


def routing_loss(routings: Sequence[Routing], *, alpha: float = 0.01) -> Tensor:
    """Σ_depths α E Σ_e m_e P_e: the one router is charged at each depth at which it is called.

    m_e is the share of slots that chose e, before any are dropped, and P_e its mean score; each depth's term
    is α when balanced.

    Args:
        routings: one per depth.
        alpha: weight of a depth's loss.

    >>> import torch
    >>> round(routing_loss([Routing.dense(torch.full((6, 4), 0.25))] * 3).item(), 6)
    0.03
    """
    return alpha * len(routings) * balance.load_balance(routings)
