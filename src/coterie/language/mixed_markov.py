"""Text with easy and hard parts: a permutation to learn in a few steps, beside a table of 1152 facts."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.nn import Routing
from coterie.train import LossFn, LossOutput

VOCAB_SIZE = 36  # 0-15 easy, 16-27 hard, 28-35 topic markers
EASY, HARD, FREE = 0, 1, 2  # labels: FREE tokens cannot be foretold and are not scored


def mixed_markov(n_seq: int, seq_len: int, seed: int, *, tables_seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences of easy and hard segments, 8 to 16 tokens each, in equal shares.

    An easy segment starts anywhere and goes on by a fixed permutation of 16 tokens: a bigram. A hard one
    names one of 8 topics and two tokens; with probability 0.95 the next token is a table's entry for the
    topic and the last two tokens, otherwise uniform.

    Args:
        n_seq: N sequences.
        seq_len: S; sequences have S + 1 tokens, so that each of S has a next one.
        seed: of the sequences.
        tables_seed: of permutation and table; the same for training and validation.

    Returns: ids [N, S + 1] int64 below 36, and the labels of the same tokens: 0 easy, 1 hard, 2 not scored.

    >>> ids, labels = mixed_markov(2, 64, seed=0)
    >>> ids.shape, sorted(set(labels.flatten().tolist()))
    (torch.Size([2, 65]), [0, 1, 2])
    """
    tables = np.random.default_rng(tables_seed)
    facts, successor = tables.integers(12, size=(8, 12, 12)).tolist(), tables.permutation(16).tolist()
    rng = np.random.default_rng(seed)
    ids, labels = np.zeros((2, n_seq, seq_len + 1), np.int64)
    for row in range(n_seq):
        tokens: list[int] = []
        kinds: list[int] = []
        while len(tokens) <= seq_len:
            easy, length = rng.random() < 0.5, int(rng.integers(8, 17))
            segment = _easy(rng, length, successor) if easy else _hard(rng, length, facts)
            tokens += segment
            free = len(segment) - length
            kinds += [FREE] * free + [EASY if easy else HARD] * length
        ids[row], labels[row] = tokens[: seq_len + 1], kinds[: seq_len + 1]
    return torch.from_numpy(ids), torch.from_numpy(labels)


def scored_loss(penalty: Callable[[list[Routing]], Tensor] | None = None) -> LossFn:
    """Next-token cross-entropy of the targets that can be foretold, plus a penalty on the routings.

    Args:
        penalty: a loss on the model's routings, with its weight: `lambda r: 0.01 * load_balance(r)`.

    Returns: a loss function for batches (ids [B, S + 1], labels [B, S + 1]) as a
    `TensorDataset(*mixed_markov(...))` gives, and models that map ids [B, S] to (logits [B, S, V], routings).

    >>> from coterie.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(36, dim=16, layers=1, heads=1, kv_heads=1, head_dim=16, hidden=32))
    >>> scored_loss()(model, mixed_markov(2, 64, seed=0)).tokens < 128
    True
    """

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
        ids, labels = batch
        logits_BSV, routings = model(ids[:, :-1])
        scored = labels[:, 1:] != FREE
        cross_entropy = F.cross_entropy(logits_BSV[scored], ids[:, 1:][scored])
        loss = cross_entropy if penalty is None else cross_entropy + penalty(routings)
        return LossOutput(loss, cross_entropy.detach(), int(scored.sum()), list(routings))

    return loss_fn


def _easy(rng: np.random.Generator, length: int, successor: list[int]) -> list[int]:
    tokens = [int(rng.integers(16))]
    for _ in range(length):
        tokens.append(successor[tokens[-1]])
    return tokens


def _hard(rng: np.random.Generator, length: int, facts: list[list[list[int]]]) -> list[int]:
    topic, a, b = int(rng.integers(8)), int(rng.integers(12)), int(rng.integers(12))
    tokens = [28 + topic, 16 + a, 16 + b]
    for _ in range(length):
        c = facts[topic][a][b] if rng.random() < 0.95 else int(rng.integers(12))
        tokens.append(16 + c)
        a, b = b, c
    return tokens
