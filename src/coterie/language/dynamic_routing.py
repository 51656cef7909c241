"""Dynamic routing: a token goes to as many experts as it takes to reach a total score of p.

An undecided token gets more experts than a clear one. The entropy loss makes the router decide where it
can: without it, it spreads its scores to buy more experts. `routing.slots_per_token` says how many
each token used.

`swap_to_top_p` gives a trained Hugging Face model the same rule, to measure what it would save or cost.

Source: Huang et al. 2024 (dynamic routing, arXiv 2403.07652).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.models import DecoderConfig
from coterie.nn import LinearScore, MoE, Router, Routing, SwiGLUExperts, TopP, balance


def make_ffn(
    config: DecoderConfig, p: float | Sequence[float] = 0.4, *, max_k: int | None = None
) -> Callable[[int], nn.Module]:
    """Top-p layers for the reference decoder: `Decoder(config, make_ffn(config, p=0.4))`.

    Weights are the chosen scores themselves, not renormalised: what they lack to 1 is a signal.

    Args:
        config: its `top_k` is not used.
        p: total score to reach, 0 < p ≤ 1; one for every layer, or one per layer.
        max_k: most experts per token; None allows all. An untrained router, which scores all E experts
            nearly alike, chooses about p E of them.

    Raises:
        ValueError: p out of range, or not one per layer.

    >>> from coterie.models import Decoder
    >>> config = DecoderConfig(257, dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, hidden=64,
    ...                        num_experts=4, expert_hidden=32)
    >>> logits, routings = Decoder(config, make_ffn(config, p=[1.0, 0.01]))(torch.randint(257, (3, 10)))
    >>> [int(routing.load.sum()) for routing in routings]
    [120, 30]
    """
    p_L = _per_layer(p, config.layers)

    def make(layer: int) -> nn.Module:
        router = Router(LinearScore(config.dim, config.num_experts), TopP(p_L[layer], max_k=max_k))
        return MoE(router, SwiGLUExperts(config.num_experts, config.dim, config.expert_hidden))

    return make


def routing_loss(routings: Sequence[Routing], *, alpha: float = 1e-2, beta: float = 1e-4) -> Tensor:
    """Σ_layers α E Σ_e f_e Q_e + β (mean entropy of a token's scores), the paper's loss beside cross-entropy.

    f_e is the share of tokens that chose e, so that Σ f is the mean number of experts; Q_e its mean score.

    Args:
        routings: one per MoE layer.
        alpha: weight of load balance.
        beta: weight of entropy. The paper's 1e-4 is for 100 billion tokens; below a million take 1e-2. Too
            much makes every token choose one expert.

    >>> routing_loss([Routing.dense(torch.full((6, 4), 0.25))], alpha=1.0, beta=0.0).item()
    4.0
    """
    losses = []
    for routing in routings:
        experts_per_token = routing.load.sum() / routing.num_tokens.clamp(min=1)
        load = experts_per_token * balance.load_balance(routing)
        losses.append(alpha * load + beta * balance.entropy(routing))
    return torch.stack(losses).sum()


def swap_to_top_p(
    model: nn.Module,
    p: float | Sequence[float],
    *,
    max_k: int | None = None,
    renormalize: bool | None = None,
) -> "TopPSwap":
    """Gives a transformers MoE model top-p routing, in place; no weight changes.

    For every block with `experts` and a `gate` whose `weight` is [E, D] and which returns (logits, weights,
    chosen experts): Qwen3-MoE, Mixtral, OLMoE and their like. The gate goes on computing logits; top-p
    then chooses from them. Expect no free lunch: in the paper, a model trained with top-2 got worse at equal
    experts per token.

    Args:
        model: any module of transformers that holds such blocks.
        p: total score to reach, 0 < p ≤ 1; one for every MoE layer, or one per MoE layer.
        max_k: most experts per token; None for the top-k of the checkpoint, so that p = 1 changes nothing
            and any other p only saves.
        renormalize: divide the chosen scores by their sum; None for what the checkpoint does.

    Returns: the swap, with `routings` after each forward pass, and `undo()`.

    Raises:
        ValueError: p out of range or not one per layer; no such block; a gate that does not choose by the
            largest softmax scores (found by routing a few random tokens through it); experts spread over
            devices; swapped already. The model is then as it was.

    >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    >>> model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
    ...     vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    ...     head_dim=8, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=8))
    >>> with swap_to_top_p(model, p=0.3) as swap:
    ...     _ = model(torch.randint(50, (1, 10)))
    >>> [bool(routing.slots_per_token.max() <= 4) for routing in swap.routings]
    [True, True]
    """
    blocks = {name: module for name, module in model.named_modules() if _is_block(module)}
    if not blocks:
        raise ValueError(
            f"no MoE block in {type(model).__name__}; "
            "looked for modules with experts and a gate of weight [E, D]"
        )
    undo: list[Callable[[], None]] = []
    swap = TopPSwap(list(blocks), undo)
    plans = []
    for (name, block), p_layer in zip(blocks.items(), _per_layer(p, len(blocks)), strict=True):
        if getattr(block.gate, "_routes_top_p", False):
            raise ValueError(f"{name} routes by top-p already; undo() that swap first")
        if getattr(block.experts, "_is_expert_parallel", False):
            raise ValueError(
                f"{name} has its experts spread over devices; load the model without expert parallelism"
            )
        k, saved_renormalize, scale = _probe(name, block.gate)
        select = TopP(
            p_layer,
            max_k=k if max_k is None else max_k,
            renormalize=saved_renormalize if renormalize is None else renormalize,
        )
        select(torch.zeros(0, block.gate.weight.shape[0]))  # refuses a max_k that does not fit
        plans.append((name, block, select, scale))
    for name, block, select, scale in plans:
        undo += _install(name, block, select, scale, swap._routings)
    return swap


class TopPSwap:
    """What `swap_to_top_p` did, with the routings of the last forward pass, and the way back.

    Also a context manager, which undoes the swap at its end.

    Attributes:
        layers: names of the MoE blocks, in the model's order.
        routings: per layer, of the last forward pass, without gradient; `Monitor().update(swap.routings)`
            counts experts per token and load. An empty list before it.
    """

    def __init__(self, layers: list[str], undo: list[Callable[[], None]]) -> None:
        self.layers = layers
        self._undo, self._routings = undo, dict[str, Routing]()

    @property
    def routings(self) -> list[Routing]:
        return [self._routings[layer] for layer in self.layers if layer in self._routings]

    def undo(self) -> None:
        """The model routes as it did before; calling it again changes nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "TopPSwap":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _is_block(module: nn.Module) -> bool:
    weight = getattr(getattr(module, "gate", None), "weight", None)
    return isinstance(getattr(module, "experts", None), nn.Module) and getattr(weight, "ndim", 0) == 2


def _install(
    name: str, block: Any, select: TopP, scale: float, routings: dict[str, Routing]
) -> list[Callable[[], None]]:
    experts = block.experts
    # experts modules of transformers skip an id of E when told that other devices hold experts too
    skips = hasattr(experts, "_is_expert_parallel")

    def route(gate: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits_TE, weights_TK, *rest = output
        routing = select(logits_TE.float())
        routings[name] = routing.detach()
        # where they cannot skip, an unused slot computes the first choice again, with weight 0
        unused = routing.num_experts if skips else routing.experts[:, :1]
        chosen_TK = routing.experts.where(routing.used, unused)
        return logits_TE, (scale * routing.weights).to(weights_TK.dtype), chosen_TK, *rest[1:]

    handle = block.gate.register_forward_hook(route)
    block.gate._routes_top_p = True
    undo = [handle.remove, lambda: delattr(block.gate, "_routes_top_p")]
    if skips:
        experts._is_expert_parallel = True
        undo.append(lambda: setattr(experts, "_is_expert_parallel", False))
    return undo


@torch.no_grad()
def _probe(name: str, gate: Any) -> tuple[int, bool, float]:
    """How a gate selects: its top-k, whether it renormalises, and the factor on its weights."""
    weight = gate.weight
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(64, weight.shape[1], generator=generator).to(weight)
    # logits of a spread of 2, so that renormalised scores and plain ones differ
    output = gate(x_TD * (2 / F.linear(x_TD, weight).float().std().clamp(min=1e-6)).to(x_TD))
    if not isinstance(output, tuple) or len(output) < 3:
        raise ValueError(f"{name}.gate does not return (logits, weights, experts); it cannot be swapped")
    logits_TE, weights_TK = output[0].float(), output[1].float()
    k = weights_TK.shape[-1]
    best_TK = logits_TE.softmax(-1).topk(k).values
    mine_TK = weights_TK.sort(-1, descending=True).values
    for renormalize, expected_TK in ((True, best_TK / best_TK.sum(-1, keepdim=True)), (False, best_TK)):
        scale = float(mine_TK.sum() / expected_TK.sum())
        if torch.allclose(mine_TK, scale * expected_TK, rtol=0.02, atol=1e-3):
            return k, renormalize, scale
    raise ValueError(
        f"{name}.gate does not weigh its top-{k} by softmax scores (a sigmoid or biased gate?); "
        "top-p needs scores that sum to 1"
    )


def _per_layer(p: float | Sequence[float], layers: int) -> list[float]:
    p_L = list(p) if isinstance(p, Sequence) else [p] * layers
    if len(p_L) != layers:
        raise ValueError(f"p has {len(p_L)} values but the model has {layers} MoE layers; give one for each")
    for value in p_L:
        TopP(value)  # refuses what is out of range
    return p_L
