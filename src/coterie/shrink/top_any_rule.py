"""What a router's weights tell, and what the rule of MC would make of them: the comparison of learned masks.

Letters: T tokens, K slots per token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.hf.top_any import Mask
from coterie.shrink.measure import perplexity
from coterie.shrink.protect import attention_received, gives_attention, protected
from coterie.shrink.top_any import ratio_threshold, top_any, weight_ratio
from coterie.shrink.top_any_result import Rule

PROTECTED = 0.02  # of the tokens, as MC has it


def measure_rule(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    banks: Sequence[nn.Module],
    weights: Sequence[Tensor],
    share: float,
    heldout: Sequence[Tensor],
    *,
    renormalize: bool,
) -> Rule:
    """The rule with thresholds that keep a share of the slots on the text that gave the weights.

    Args:
        model: without other masks; it is left with attn_implementation="eager".
        layers: those that the banks are in.
        banks: see `top_any`.
        weights: [T, K] of each bank, from `router_weights`.
        share: of the slots, that should stay.
        heldout: token ids [B, S] each, to measure on.
        renormalize: see `top_any`.
    """
    model.set_attn_implementation("eager")  # which gives attention weights, where there are some
    protects = gives_attention(model, layers, heldout[0][:1].to(model.device))
    if protects:  # those tokens keep all
        share = (share - PROTECTED) / (1 - PROTECTED)
    rules: list[Mask] = [
        weight_ratio(ratio_threshold(w_TK, max(share, 1 / w_TK.shape[1]))) for w_TK in weights
    ]
    with attention_received(layers if protects else []) as received:
        if protects:
            rules = [protected(rule, one, PROTECTED) for rule, one in zip(rules, received, strict=True)]
        with top_any(banks, rules, renormalize=renormalize) as kept:
            loss = perplexity(model, heldout)
    return Rule(sum(one.kept for one in kept) / sum(one.slots for one in kept), loss, protects)


def router_weights(
    model: PreTrainedModel, banks: Sequence[nn.Module], batches_BS: Sequence[Tensor]
) -> list[Tensor]:
    """[T, K] of each bank, falling; empty if no token came to it."""
    seen: list[list[Tensor]] = [[] for _ in banks]

    def watching(parts: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def mask(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
            parts.append(weights_TK.float().cpu())
            return torch.ones_like(weights_TK)

        return mask

    with top_any(banks, [watching(parts) for parts in seen], renormalize=False), torch.no_grad():
        for ids_BS in batches_BS:
            model(ids_BS.to(model.device))
    return [torch.cat(parts) if parts else torch.empty(0, 0) for parts in seen]


def is_normalized(weights_TK: Tensor) -> bool:
    """Whether a token's weights have the same sum for all tokens, but for rounding in 16 bits."""
    sums_T = weights_TK.sum(1)
    return bool(sums_T.max() - sums_T.min() <= 0.01 * sums_T.mean())
