"""What the arguments of DriftMoE may be."""

from typing import TYPE_CHECKING

from coterie.models.estimator import check_at_least, check_choice

if TYPE_CHECKING:
    from coterie.stream.driftmoe import DriftMoEClassifier


def check_settings(model: "DriftMoEClassifier") -> None:
    """ValueError, with the allowed range, for an argument outside it."""
    check_choice("mode", model.mode, ("data", "task"))
    check_choice("mask", model.mask, ("multi_hot", "best"))
    check_choice("task_predict", model.task_predict, ("router", "product"))
    check_at_least(model, 1, "n_experts")
    if not 1 <= model.top_k <= model.n_experts:
        raise ValueError(f"top_k={model.top_k} of {model.n_experts} experts; use 1 ≤ top_k ≤ n_experts")
    if model.router_batch is not None:
        check_at_least(model, 1, "router_batch")
    if not (0 < model.delta < 1 and 0 <= model.dropout < 1 and model.lr > 0 and model.grace_period >= 1):
        raise ValueError(
            f"delta={model.delta}, dropout={model.dropout}, lr={model.lr}, grace_period="
            f"{model.grace_period}; should be 0 < delta < 1, 0 ≤ dropout < 1, lr > 0, grace_period ≥ 1"
        )
    if not model.hidden or min(model.hidden) < 1:
        raise ValueError(f"hidden={model.hidden}; give the width of at least one layer")
