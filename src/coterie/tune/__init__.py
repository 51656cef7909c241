"""Changing what a trained mixture of experts knows, expert by expert."""

from coterie.tune.attribute import Affinity, Target, attribute_experts
from coterie.tune.batch import Batch
from coterie.tune.losses import METHODS, Given, Objective, objective
from coterie.tune.trainable import Slice, Weights, all_experts, all_routers, expert_slices, trainable
from coterie.tune.unlearn import SCOPES, Step, Unlearning, unlearn

__all__ = [
    "METHODS",
    "SCOPES",
    "Affinity",
    "Batch",
    "Given",
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
    "trainable",
    "unlearn",
]
