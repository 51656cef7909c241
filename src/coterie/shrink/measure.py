"""What a smaller model is measured by: bytes, parameters, perplexity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from coterie.hf import MoEBlock


@dataclass(frozen=True)
class Sizes:
    """Of a model.

    Args:
        total: parameters.
        active: of them, those that one token uses: all but the experts that it is not sent to.
        memory: bytes of parameters and buffers.
    """

    total: int
    active: int
    memory: int


def sizes(model: PreTrainedModel, blocks: Sequence[MoEBlock], keep: int | None = None) -> Sizes:
    """Counts what is there, or what would be left with `keep` experts in each block."""
    total, active = sum(p.numel() for p in model.parameters()), 0
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memory = sum(t.numel() * t.element_size() for t in tensors.values())
    active = total
    for block in blocks:
        rows = [t for t in (*vars(block.experts).values(), *vars(block.router).values()) if t is not None]
        left = block.num_experts if keep is None else keep
        gone = block.num_experts - left
        total -= gone * sum(t[0].numel() for t in rows)
        memory -= gone * sum(t[0].numel() * t.element_size() for t in rows)
        active -= gone * sum(t[0].numel() for t in rows)
        active -= (left - block.top_k) * sum(
            t[0].numel() for t in vars(block.experts).values() if t is not None
        )
    return Sizes(total, active, memory)


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches_BS: Sequence[Tensor]) -> float:
    """exp of the mean cross-entropy of each token given those before it.

    Args:
        model: causal.
        batches_BS: token ids [B, S] each, without padding, S ≥ 2.
    """
    total, tokens = 0.0, 0
    for ids_BS in batches_BS:
        ids_BS = ids_BS.to(model.device)
        logits_BSV = model(ids_BS).logits[:, :-1].float()
        total += F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="sum").item()
        tokens += ids_BS[:, 1:].numel()
    return math.exp(total / tokens)
