"""What a model knows of a text, by predicting it, and which experts it sends it to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from coterie.hf import MoEBlock, route
from coterie.nn import Routing, expert_overlap
from coterie.tune.batch import Batch


@dataclass(frozen=True)
class Prediction:
    """How a model predicts the tokens of a text that count.

    Args:
        cross_entropy: nats per token.
        accuracy: share of the tokens that are the most likely ones.
    """

    cross_entropy: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """exp of the cross-entropy; infinity where that is beyond a float."""
        return math.exp(self.cross_entropy) if self.cross_entropy < 700 else math.inf


@torch.no_grad()
def predict(model: PreTrainedModel, batches: Sequence[Batch]) -> Prediction:
    """Predicts each token from those before it.

    Args:
        model: causal, in evaluation mode.
        batches: at least one.
    """
    nats, right, tokens = 0.0, 0, 0
    for batch in batches:
        batch = batch.to(model.device)
        logits_NV = model(**batch.inputs()).logits[:, :-1].flatten(0, 1)
        targets_N = batch.targets().flatten()
        counts_N = targets_N != -100
        logits_NV, targets_N = logits_NV[counts_N].float(), targets_N[counts_N]
        nats += F.cross_entropy(logits_NV, targets_N, reduction="sum").item()
        right += int((logits_NV.argmax(1) == targets_N).sum())
        tokens += len(targets_N)
    return Prediction(nats / tokens, right / tokens)


@torch.no_grad()
def choices(
    model: PreTrainedModel, blocks: Sequence[MoEBlock], batches: Sequence[Batch]
) -> list[list[Routing]]:
    """The routings of each batch, without scores and logits: they would be most of the memory.

    Args:
        model: in evaluation mode.
        blocks: of the model.
        batches: of text.

    Returns, for each batch, one on the CPU for each block.
    """
    found = []
    for batch in batches:
        _, routings = route(model, blocks, **batch.to(model.device).inputs())
        none = torch.empty(0)
        found.append([replace(routing.to("cpu"), scores=none, logits=none) for routing in routings])
    return found


def overlap(before: list[list[Routing]], after: list[list[Routing]]) -> float:
    """Share of the experts in `choices` before that are still chosen, over all tokens and blocks."""
    tokens = [routings[0].experts.shape[0] for routings in before]
    shares = [expert_overlap(old, new) for old, new in zip(before, after, strict=True)]
    return sum(n * share for n, share in zip(tokens, shares, strict=True)) / sum(tokens)
