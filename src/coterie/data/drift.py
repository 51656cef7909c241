"""Streams whose concept changes: a composer, and the drifting SEA, LED and RBF streams of the literature."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

Row = tuple[dict[Any, Any], Any]


class DriftStream:
    """Concepts one after the other: rows of the first until a position, then of the second, and so on.

    Around a position p the probability of the new concept is 1 / (1 + exp(-4 (t - p) / width)), as in MOA. A
    concept that is drawn from goes on where it was left. Every iteration gives the same rows.

    Args:
        concepts: two or more streams of (features, label); an object given twice is a concept that recurs.
        positions: rows at which the concept changes, increasing, one fewer than concepts.
        width: rows that a change takes; 1 is an abrupt change, where nothing is drawn.
        length: rows in all; None for as many as there are.
        seed: of the draws.

    Raises ValueError: too few concepts, positions that do not fit, width below 1.

    >>> stream = DriftStream([[({}, "a")] * 9, [({}, "b")] * 9], positions=[3], width=1, length=6)
    >>> "".join(y for _, y in stream)
    'aaabbb'
    """

    def __init__(
        self,
        concepts: Sequence[Iterable[Row]],
        positions: Sequence[int],
        *,
        width: int = 50,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        if len(concepts) < 2 or len(positions) != len(concepts) - 1:
            raise ValueError(
                f"{len(concepts)} concepts and {len(positions)} positions; give at least two concepts, and a "
                "position for each change"
            )
        if list(positions) != sorted(set(positions)) or positions[0] < 1:
            raise ValueError(f"positions={list(positions)}; should increase and begin at 1 or later")
        if width < 1:
            raise ValueError(f"width={width}; use at least 1, which is an abrupt change")
        self.concepts, self.positions, self.width = list(concepts), list(positions), width
        self.length, self.seed = length, seed

    def __iter__(self) -> Iterator[Row]:
        rng = random.Random(self.seed)
        rows = {id(concept): iter(concept) for concept in self.concepts}
        for t in count() if self.length is None else range(self.length):
            try:
                yield next(rows[id(self.concepts[self._concept(t, rng)])])
            except StopIteration:
                return

    def _concept(self, t: int, rng: random.Random) -> int:
        if self.width == 1:
            return sum(t >= position for position in self.positions)
        concept = 0
        for position in self.positions:
            away = -4 * (t - position) / self.width
            if away < 700 and rng.random() < 1 / (1 + math.exp(away)):  # exp of more overflows
                concept += 1
        return concept


def sea_drift(segment: int, *, width: int = 1, noise: float = 0.0, seed: int = 0) -> DriftStream:
    """SEA: three numbers, two classes, a threshold that moves: river's variants 0, 1, 3, and 0 again.

    Args:
        segment: rows of each concept.
        width: rows that a change takes; 1 for abrupt.
        noise: share of flipped labels.
        seed: of rows and changes.

    Source: Street, Kim, A streaming ensemble algorithm (SEA) for large-scale classification, KDD 2001.
    """
    synth = _river_synth()
    variants = (0, 1, 3, 0)
    concepts = [synth.SEA(variant=v, noise=noise, seed=100 * seed + i) for i, v in enumerate(variants)]
    return _equal_segments(concepts, segment, width, seed)


def led_drift(segment: int, *, width: int = 1, noise: float = 0.1, seed: int = 0) -> DriftStream:
    """LED: a digit's seven segments among 24 binary attributes, 1, 3, 5, then 7 of which change places.

    Args:
        segment: rows of each concept.
        width: rows that a change takes; 1 for abrupt.
        noise: share of inverted attributes.
        seed: of rows and changes.

    Source: Breiman et al., Classification and Regression Trees, 1984; with drift as in MOA.
    """
    synth = _river_synth()
    concepts = [
        synth.LEDDrift(
            seed=100 * seed + i, noise_percentage=noise, irrelevant_features=True, n_drift_features=drifting
        )
        for i, drifting in enumerate((1, 3, 5, 7))
    ]
    return _equal_segments(concepts, segment, width, seed)


def rbf_drift(length: int, *, speed: float = 1e-3, seed: int = 0) -> Iterator[Row]:
    """RBF: ten numbers around 50 moving centroids of five classes; the drift never stops.

    Args:
        length: rows.
        speed: of the centroids, per row: 1e-4 moderate, 1e-3 fast.
        seed: of centroids and rows.
    """
    stream = _river_synth().RandomRBFDrift(
        seed_model=seed,
        seed_sample=seed + 1,
        n_classes=5,
        n_features=10,
        n_centroids=50,
        n_drift_centroids=50,
        change_speed=speed,
    )
    rows: Iterator[Row] = islice(iter(stream), length)
    return rows


def _equal_segments(concepts: Sequence[Iterable[Row]], segment: int, width: int, seed: int) -> DriftStream:
    positions = [segment * i for i in range(1, len(concepts))]
    return DriftStream(concepts, positions, width=width, length=segment * len(concepts), seed=seed)


def _river_synth() -> Any:
    try:
        from river.datasets import synth
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "these streams need river; install it with: pip install 'coterie[stream]'"
        ) from None
    return synth
