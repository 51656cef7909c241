"""Tokens that keep all their experts: those that others attend to most.

with attention_received([block.layer for block in blocks]) as received:
    masks = [protected(weight_ratio(0.5), attention) for attention in received]
    with top_any(banks, masks, renormalize=True):
        model(ids)

Letters: T tokens, K slots per token, D width, B sequences, H heads, S positions.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coterie.hf.top_any import Mask


@dataclass
class Attention:
    """What the tokens of one layer's last pass received.

    Args:
        mean_T: mean attention from the queries that can see a token, over heads, in the order of the MoE
            block's tokens.
    """

    mean_T: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def attention_received(layers: Sequence[nn.Module]) -> Iterator[list[Attention]]:
    """Records, while the context is open, how much attention each token gets in each layer.

    The attention of a layer runs before its MoE block, so that a mask of the block can read the same pass.

    Args:
        layers: with a causal `self_attn` that gives its weights: the model must have been loaded, or set,
            to attn_implementation="eager".

    Yields: one record per layer, replaced by each pass.

    Raises ValueError, in a pass, when attention weights are not given.
    """
    records = [Attention() for _ in layers]
    with ExitStack() as hooks:
        for layer, record in zip(layers, records, strict=True):
            attention: Any = layer.self_attn
            hooks.callback(attention.register_forward_hook(_receiving(record)).remove)
        yield records


@torch.no_grad()
def gives_attention(model: nn.Module, layers: Sequence[nn.Module], ids_BS: Tensor) -> bool:
    """Whether every one of these layers has a `self_attn` that gives its weights, found by one pass.

    Not so where it attends to something else than the tokens, such as summaries of some of them.
    """
    if any(getattr(layer, "self_attn", None) is None for layer in layers):  # or a state-space model
        return False
    given: list[Tensor | None] = []
    with ExitStack() as hooks:
        for layer in layers:
            attention: Any = layer.self_attn
            hook = attention.register_forward_hook(lambda module, args, y: given.append(_weights(y)))
            hooks.callback(hook.remove)
        model(ids_BS)
    square = (ids_BS.shape[1],) * 2
    return all(weights is not None and weights.shape[-2:] == square for weights in given)


def protected(rule: Mask, attention: Attention, share: float = 0.02) -> Mask:
    """A rule, with all slots kept for the tokens that matter most: largest |x|₁ · attention received.

    Args:
        rule: for the other tokens.
        attention: of the same layer, from `attention_received`.
        share: of the tokens of a pass that are protected, rounded up.

    Source: Huang et al. 2024 (MC, arXiv 2410.06270), section 3.3: 2% of tokens.
    """

    def mask(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        if len(attention.mean_T) != len(x_TD):
            raise ValueError(
                f"attention to {len(attention.mean_T)} tokens is known, but the block has {len(x_TD)}; "
                "use the mask inside attention_received, with the record of its own layer"
            )
        kept_TK = rule(x_TD, weights_TK)
        importance_T = x_TD.float().abs().sum(1) * attention.mean_T
        most = importance_T.topk(math.ceil(share * len(x_TD))).indices
        return kept_TK.index_fill(0, most, 1.0)

    return mask


def _receiving(record: Attention) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        weights_BHSS = _weights(output)
        if weights_BHSS is None:
            raise ValueError(
                f"{type(module).__name__} gives no attention weights; "
                'call model.set_attn_implementation("eager") first'
            )
        length = weights_BHSS.shape[-1]
        seen_by_S = length - torch.arange(length, device=weights_BHSS.device)
        record.mean_T = (weights_BHSS.float().mean(1).sum(1) / seen_by_S).flatten()

    return hook


def _weights(output: Any) -> Tensor | None:
    """[B, H, S, S] what an attention module returned beside its output, if it did."""
    return output[1] if isinstance(output, tuple) and len(output) > 1 else None
