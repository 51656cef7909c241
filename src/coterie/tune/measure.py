"""What a model knows of a text, by predicting it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

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
