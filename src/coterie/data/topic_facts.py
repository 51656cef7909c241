"""Facts of several topics: keys with one response each, and general keys, which every topic's text has."""

import numpy as np
import torch
from torch import Tensor

TOPICS = 8
TOPIC_KEYS = 24
GENERAL_KEYS = 96
RESPONSES = 64
PAIRS = 16
KEYS = TOPICS * TOPIC_KEYS + GENERAL_KEYS
VOCAB_SIZE = KEYS + RESPONSES


def topic_facts(n_seq: int, seed: int, *, topics: tuple[int, ...] = tuple(range(TOPICS))) -> Tensor:
    """Sequences of 16 (key, response) pairs; half of the pairs are of the sequence's topic, half general.

    Each of 8 topics has 24 keys, and there are 96 general ones; every key has one of 64 responses, the same
    for every call. All draws are uniform; the keys of a topic have 24 different responses, so that one answer
    to all is right for 1/24 of them.

    Args:
        n_seq: N sequences.
        seed: of the sequences.
        topics: each sequence is about one of these, 0 to 7.

    Returns: ids [N, 32] int64, keys and responses by turns: topical keys are 0 to 191, those of topic z from
    24 z on; general keys 192 to 287; responses 288 to 351.

    Raises ValueError for a topic that does not exist.

    >>> ids = topic_facts(5, seed=0, topics=(3,))
    >>> ids.shape, set(topic_of(ids[:, ::2]).flatten().tolist()), bool((ids[:, 1::2] >= 288).all())
    (torch.Size([5, 32]), {3, -1}, True)
    """
    if not topics or not all(0 <= topic < TOPICS for topic in topics):
        raise ValueError(f"topics={topics}; name some of 0 to {TOPICS - 1}")
    table = np.random.default_rng(0)
    topical = [table.permutation(RESPONSES)[:TOPIC_KEYS] for _ in range(TOPICS)]
    response_of = KEYS + np.concatenate([*topical, table.integers(RESPONSES, size=GENERAL_KEYS)])
    rng = np.random.default_rng(seed)
    topic_N1 = rng.choice(topics, size=(n_seq, 1))
    topical_NP = TOPIC_KEYS * topic_N1 + rng.integers(TOPIC_KEYS, size=(n_seq, PAIRS))
    general_NP = rng.integers(TOPICS * TOPIC_KEYS, KEYS, size=(n_seq, PAIRS))
    keys_NP = np.where(rng.random((n_seq, PAIRS)) < 0.5, general_NP, topical_NP)
    pairs_NP2 = np.stack((keys_NP, response_of[keys_NP]), axis=2)
    return torch.from_numpy(pairs_NP2.reshape(n_seq, 2 * PAIRS))


def topic_of(ids: Tensor) -> Tensor:
    """The topic of each token, 0 to 7, if it is a topical key; -1 if it is a general key or a response."""
    return torch.where(ids < TOPICS * TOPIC_KEYS, ids // TOPIC_KEYS, -1)
