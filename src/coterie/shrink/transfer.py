"""Routers in the place of a transformers block's own, in memory.

A configuration of transformers cannot say p' = M p: where dropped experts' tokens should follow their
neurons, the block's router is put aside while a context is open, and one of coterie's takes its place.

Letters: T tokens, E experts, R of them after a merge, K slots per token, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coterie.hf import BlockRecord, MoEBlock
from coterie.hf.calls import call_arguments, changed_call
from coterie.nn import AnyRouter, LinearScore, RemapScores, Router, Routing, TopK

_SAME_WEIGHT = 0.02  # bfloat16 has 8 bits
_SAME_TOKENS = 0.99  # some of whose logits tie in bfloat16


def softmax_router(block: MoEBlock, record: BlockRecord) -> Router:
    """The block's router as `Router(LinearScore, TopK)`, with copies of its weights.

    Args:
        block: not edited yet.
        record: what it did, with its inputs: the copy must do the same.

    Raises ValueError if the router does anything else than choose the top-k of a softmax.

    >>> from coterie.hf import find_moe_blocks, recording
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
    >>> blocks = find_moe_blocks(model)
    >>> with recording(blocks, keep_inputs=10) as records:
    ...     _ = model(torch.arange(10).view(2, 5))
    >>> softmax_router(blocks[0], records[0]).select.renormalize
    True
    """
    entries = block.router
    if not len(record.inputs):
        raise ValueError(f"{block.name}: no inputs were recorded; use recording(blocks, keep_inputs=1024)")
    other = sorted(set(block.layout.router) - {"rows", "bias"})
    if other or block.layout.groups > 1 or entries.rows.shape[1] != record.inputs.shape[1]:
        found = other or ([f"{block.layout.groups} groups"] if block.layout.groups > 1 else ["other inputs"])
        raise ValueError(f"{block.name}: the router has {', '.join(found)}; a plain top-k softmax is needed")
    score = LinearScore(entries.rows.shape[1], block.num_experts, bias=entries.bias is not None)
    with torch.no_grad():
        score.weight.copy_(entries.rows)
        if score.bias is not None and entries.bias is not None:
            score.bias.copy_(entries.bias)
    weights_TK = record.weights[: len(record.inputs)]
    renormalize = bool((weights_TK.sum(1) - 1).abs().median() < _SAME_WEIGHT)
    router = Router(score, TopK(block.top_k, renormalize=renormalize))
    recorded = record.experts[: len(record.inputs)], weights_TK
    same = _agreement(router(record.inputs), *recorded)
    if same < _SAME_TOKENS:
        raise ValueError(
            f"{block.name}: a softmax over {block.num_experts} logits, top-{block.top_k}, gives the recorded "
            f"weights to {same:.0%} of the tokens only; the router is of another kind"
        )
    return router.requires_grad_(False)


def transferred(router: Router, transfer_RE: Tensor) -> Router:
    """The router whose scores are p' = M p: tokens of dropped experts follow their neurons.

    Args:
        router: of the E experts, with a softmax gate.
        transfer_RE: M, as in `Recombined`.

    Weights that are not renormalised to the chosen ones sum to 1 over all R experts.

    >>> router = Router(LinearScore(4, 3), TopK(1))
    >>> transferred(router, torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]))(torch.randn(5, 4)).num_experts
    2
    """
    return Router(RemapScores(router.score, transfer_RE), router.select)


@contextmanager
def rerouted(blocks: Sequence[MoEBlock], routers: Sequence[AnyRouter]) -> Iterator[None]:
    """While the context is open, these routers choose and weigh the experts of these blocks.

    Args:
        blocks: of one model.
        routers: one for each; they read what the experts read.

    Raises ValueError if a router has another number of experts than its block.
    """
    with ExitStack() as hooks:
        for block, router in zip(blocks, routers, strict=True):
            if router.num_experts != block.num_experts:
                raise ValueError(
                    f"{block.name} has {block.num_experts} experts and its router {router.num_experts}"
                )
            if isinstance(router, nn.Module):
                router.to(next(block.bank.parameters()).device)
            hook = block.bank.register_forward_pre_hook(_reroute(router), with_kwargs=True)
            hooks.callback(hook.remove)
        yield


def _reroute(router: AnyRouter) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = call_arguments(args, kwargs)
        routing = router(given["hidden_states"])
        chosen = {
            "top_k_index": routing.experts.clamp(min=0).to(given["top_k_index"]),  # an unused slot weighs 0
            "top_k_weights": routing.weights.to(given["top_k_weights"]),
        }
        return changed_call(args, kwargs, chosen)

    return hook


def _agreement(routing: Routing, experts_TK: Tensor, weights_TK: Tensor) -> float:
    """Share of tokens that got the same weights."""
    ours_TE, theirs_TE = (
        torch.zeros(len(experts_TK), routing.num_experts).scatter_add_(1, chosen, weights.float())
        for chosen, weights in ((routing.experts, routing.weights), (experts_TK, weights_TK))
    )
    return ((ours_TE - theirs_TE).abs().amax(1) < _SAME_WEIGHT).float().mean().item()
