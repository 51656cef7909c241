"""What the arguments of DriftMoE may be."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coterie.stream.driftmoe import DriftMoEClassifier


def check_settings(model: "DriftMoEClassifier") -> None:
    """ValueError, with the allowed range, for an argument outside it."""
    for name, allowed in (
        ("mode", ("data", "task")),
        ("mask", ("multi_hot", "best")),
        ("task_predict", ("router", "product")),
    ):
        if getattr(model, name) not in allowed:
            raise ValueError(f"{name}={getattr(model, name)!r}; use one of {', '.join(allowed)}")
    if model.n_experts < 1:
        raise ValueError(f"n_experts={model.n_experts}; use at least 1")
    if not 1 <= model.top_k <= model.n_experts:
        raise ValueError(f"top_k={model.top_k} of {model.n_experts} experts; use 1 ≤ top_k ≤ n_experts")
    if model.router_batch is not None and model.router_batch < 1:
        raise ValueError(f"router_batch={model.router_batch}; use at least 1")
    if not (0 < model.delta < 1 and 0 <= model.dropout < 1 and model.lr > 0 and model.grace_period >= 1):
        raise ValueError(
            f"delta={model.delta}, dropout={model.dropout}, lr={model.lr}, grace_period="
            f"{model.grace_period}; should be 0 < delta < 1, 0 ≤ dropout < 1, lr > 0, grace_period ≥ 1"
        )
    if not model.hidden or min(model.hidden) < 1:
        raise ValueError(f"hidden={model.hidden}; give the width of at least one layer")
