"""MomentumSMoE: the outputs of mixtures of experts join the residual stream with momentum over depth.

The momentum is a state of the forward pass (`coterie.nn.depth`): a decoder built so caches and generates like
any other. The paper's language models are post-norm and normalise the momentum's step together with x; here
it is the reference decoder's pre-norm layers, which the authors' code offers as an option.

Source: Teo and Nguyen 2024 (MomentumSMoE, arXiv 2410.14574).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from coterie.models import Decoder, DecoderConfig
from coterie.nn import (
    AdamResidual,
    LinearScore,
    MLPExperts,
    MoE,
    MomentumResidual,
    PlainResidual,
    Residual,
    Router,
    Routing,
    SwiGLU,
    TopK,
    robust_momentum,
)


def make_ffn(config: DecoderConfig, *, every: int = 1) -> Callable[[int], nn.Module]:
    """The paper's mixtures of experts for the reference decoder: a gate with a bias, ReLU, biases in experts.

    Args:
        config: `num_experts`, `top_k` and `expert_hidden` hold; `hidden` for dense layers.
        every: 2 makes every second layer dense, from the second on, as in GLaM.

    Raises:
        ValueError: every below 1.

    >>> config = DecoderConfig(257, dim=32, layers=4, heads=2, kv_heads=1, head_dim=16, hidden=64,
    ...                        num_experts=4, expert_hidden=32)
    >>> residual = make_residual(4, ["momentum", "smoe"] * 2)
    >>> model = Decoder(config, make_ffn(config, every=2), residual)
    >>> [type(layer.residual).__name__ for layer in model.layers]
    ['MomentumResidual', 'PlainResidual', 'MomentumResidual', 'PlainResidual']
    """
    if every < 1:
        raise ValueError(f"every={every}; should be at least 1")

    def make(layer: int) -> nn.Module:
        if layer % every:
            return SwiGLU(config.dim, config.hidden)
        router = Router(LinearScore(config.dim, config.num_experts, bias=True), TopK(config.top_k))
        return MoE(
            router, MLPExperts(config.num_experts, config.dim, config.expert_hidden, activation="relu")
        )

    return make


def make_residual(
    layers: int,
    kinds: str | Sequence[str] = "momentum",
    *,
    mu: float = 0.7,
    gamma: float = 1.0,
    adam_gamma: float = 0.1,
    learnable: bool = False,
) -> Callable[[int], Residual]:
    """Residuals for the reference decoder: `Decoder(config, make_ffn(config), make_residual(config.layers))`.

    Args:
        layers: how many the model has.
        kinds: "smoe" adds, as dense layers should: the momentum of others passes through; "momentum" is
            heavy-ball, "robust" its robust form, "adam" Adam. One per layer, or one for all, where "adam" is
            the paper's AdamSMoE: Adam in the first layer, heavy-ball in the others.
        mu: μ of heavy-ball momentum, also of what Adam hands on.
        gamma: γ of heavy-ball momentum.
        adam_gamma: γ of Adam. The paper's 0.8 and 1 are for layers that leave their input out.
        learnable: learn μ and γ of each heavy-ball layer, from these.

    Raises:
        ValueError: an unknown kind, or not one per layer; a number out of range.
    """
    if kinds == "adam":
        kinds = ["adam", *["momentum"] * (layers - 1)]
    kind_L = [kinds] * layers if isinstance(kinds, str) else list(kinds)
    if len(kind_L) != layers:
        raise ValueError(f"{len(kind_L)} kinds for {layers} layers; give one, or one per layer")
    make: dict[str, Callable[[], Residual]] = {
        "smoe": PlainResidual,
        "momentum": partial(MomentumResidual, mu, gamma, learnable=learnable),
        "adam": partial(AdamResidual, adam_gamma, mu=mu),
        "robust": robust_momentum,
    }
    for kind in kind_L:
        if kind not in make:
            raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(make)}")
        make[kind]()  # numbers out of range are refused here already
    return lambda layer: make[kind_L[layer]]()


def with_momentum(
    model: Decoder, mu: float = 0.7, gamma: float = 0.3, layers: Iterable[int] | None = None
) -> Decoder:
    """Gives a trained decoder momentum, in place, to fine-tune it; no weight changes.

    A steady update has the effect that it had before where γ = 1 - μ, as by default. Experts go on pulling
    the way they were trained to: with the other sign of the paper's two, p ← μ p - u, they would push.

    Args:
        model: any decoder.
        mu: μ.
        gamma: γ.
        layers: their indices; None for all that hold a mixture of experts.

    Returns: the same model.

    Raises:
        ValueError: a number out of range, or no such layer.

    >>> config = DecoderConfig(257, dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, hidden=64)
    >>> with_momentum(Decoder(config), layers=[1]).layers[1].residual
    MomentumResidual(mu=0.7, gamma=0.3, lookahead=0)
    """
    if layers is None:
        layers = [i for i, layer in enumerate(model.layers) if isinstance(layer.mlp, MoE)]
    chosen = list(layers)
    if not chosen or not all(0 <= i < len(model.layers) for i in chosen):
        raise ValueError(f"layers={chosen}; the decoder has layers 0 to {len(model.layers) - 1}: give some")
    for i in chosen:
        model.layers[i].residual = MomentumResidual(mu, gamma)
    return model


class ResidualClassifier(nn.Module):
    """Vectors to classes by mixtures of experts that join a residual stream, and nothing else.

    Args:
        dim_in: width of an input [N, …], flattened.
        dim: D, width of the stream and of an expert.
        classes: C.
        layers: how many mixtures, each x ← residual(x, SMoE(LayerNorm x)).
        num_experts: E, ReLU, behind a top-2 gate with a bias.
        make_residual: layer index → how it joins.

    Returns (from forward): logits [N, C] and one Routing per layer.

    >>> import torch
    >>> model = ResidualClassifier(64, 16, 10, layers=2, num_experts=4, make_residual=make_residual(2))
    >>> model(torch.randn(3, 1, 8, 8))[0].shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        dim_in: int,
        dim: int,
        classes: int,
        *,
        layers: int,
        num_experts: int,
        make_residual: Callable[[int], Residual],
    ) -> None:
        super().__init__()
        self.read = nn.Linear(dim_in, dim)
        self.write = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.moes = nn.ModuleList(
            MoE(
                Router(LinearScore(dim, num_experts, bias=True), TopK(2)),
                MLPExperts(num_experts, dim, dim, bias=False, activation="relu"),
            )
            for _ in range(layers)
        )
        self.residuals: Any = nn.ModuleList(make_residual(layer) for layer in range(layers))  # type: ignore[misc]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Routing]]:
        x_ND, state, routings = self.read(x.flatten(1)), None, list[Routing]()
        for norm, moe, residual in zip(self.norms, self.moes, self.residuals, strict=True):
            update_ND, routing = moe(norm(residual.point(x_ND, state)))
            x_ND, state = residual(x_ND, update_ND, state)
            routings.append(routing)
        return self.write(x_ND), routings
