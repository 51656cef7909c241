"""Changing what a trained mixture of experts knows, expert by expert."""

from coterie.tune.attribute import Affinity, Target, attribute_experts
from coterie.tune.batch import Batch
from coterie.tune.history import Step, Unlearning
from coterie.tune.kept import Kept
from coterie.tune.losses import METHODS, Given, Objective, objective
from coterie.tune.trainable import (
    SCOPES,
    Slice,
    Weights,
    all_experts,
    all_routers,
    expert_slices,
    replaced,
    scope_slices,
    snapshot,
    trainable,
)
from coterie.tune.unlearn import unlearn

__all__ = [
    "METHODS",
    "SCOPES",
    "Affinity",
    "Batch",
    "Given",
    "Kept",
    "Objective",
    "Slice",
    "Step",
    "Target",
    "Unlearning",
    "Weights",
    "all_experts",
    "all_routers",
    "attribute_experts",
    "expert_slices",
    "objective",
    "replaced",
    "scope_slices",
    "snapshot",
    "trainable",
    "unlearn",
]
