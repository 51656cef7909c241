"""How training to forget goes: step by step, and in all."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from coterie.tune.attribute import Target

FORGET = "forget"
"""The key of the number that `stop_at` is about, in what `evaluate` returns."""


@dataclass(frozen=True)
class Step:
    """One step of training, or an evaluation before the first.

    Args:
        step: from 1; 0 before training.
        forget: loss on the batch to forget; NaN at step 0, like the others.
        retain: loss on the batch to keep, without its weight; 0 where the method has none.
        anchor: router anchor loss, without its weight.
        measured: what `evaluate` returned after this step; empty where it was not asked.
    """

    step: int
    forget: float = math.nan
    retain: float = math.nan
    anchor: float = math.nan
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unlearning:
    """How a model was made to forget.

    Args:
        targets: the experts that were unlearned; those that would have been, where the scope is another.
        trained: numbers that were trained.
        trained_share: of all parameters.
        history: one entry per step, and one before the first if there was an `evaluate`.
        reached: whether it ended because the forget level was reached.
    """

    targets: list[Target]
    trained: int
    trained_share: float
    history: list[Step]
    reached: bool
