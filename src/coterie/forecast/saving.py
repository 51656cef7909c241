"""A fitted forecaster in a folder, and back: with the tiny language model, or the digest of another."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from coterie.forecast.backbone import TINY, load_backbone, untrained_tiny
from coterie.models import load_estimator, save_estimator
from coterie.train import EpochHistory

if TYPE_CHECKING:
    from coterie.forecast.smetimes import SMETimesForecaster


def save(estimator: "SMETimesForecaster", folder: str | Path) -> Path:
    """What `SMETimesForecaster.save` says."""
    backbone = estimator.model_.backbone
    tensors = estimator.model_.state_dict() if backbone.name == TINY else estimator.model_.trained()
    learnt = {
        "time_col": estimator.time_col_,
        "columns": estimator.columns_,
        "step": estimator.step_,
        "mean": estimator.mean_.tolist(),
        "deviation": estimator.deviation_.tolist(),
        "usage": estimator.expert_usage_by_column_.tolist(),
        "history": vars(estimator.history_),
        "backbone": {"name": backbone.name, "digest": backbone.digest},
    }
    return save_estimator(
        folder, type(estimator).__name__, parameters=estimator.get_params(), learnt=learnt, tensors=tensors
    )


def load(
    cls: "type[SMETimesForecaster]", folder: str | Path, *, backbone: str | None
) -> "SMETimesForecaster":
    """What `SMETimesForecaster.load` says."""
    parameters, learnt, tensors = load_estimator(folder, cls.__name__)
    wanted = learnt["backbone"]
    if backbone is not None:
        parameters["backbone"] = backbone
    estimator = cls(**parameters)
    is_tiny = estimator.backbone == TINY
    language_model = untrained_tiny() if is_tiny else load_backbone(estimator.backbone)
    with torch.random.fork_rng(devices=[]):
        estimator.model_ = estimator._build(language_model)
    if is_tiny == (wanted["name"] == TINY):
        estimator.model_.load_state_dict(tensors, strict=is_tiny)
    found = estimator.model_.backbone.digest
    if found != wanted["digest"]:
        raise ValueError(
            f"{folder} was fitted on the backbone {wanted['name']!r} with digest {wanted['digest'][:12]}…, "
            f"but that of {estimator.backbone!r} is {found[:12]}…; give the folder of the same model as "
            "backbone="
        )
    estimator.model_.eval()
    estimator.time_col_, estimator.columns_ = learnt["time_col"], learnt["columns"]
    estimator.step_ = learnt["step"]
    estimator.mean_, estimator.deviation_ = np.array(learnt["mean"]), np.array(learnt["deviation"])
    estimator.history_ = EpochHistory(**learnt["history"])
    estimator._set_usage(np.array(learnt["usage"]))
    return estimator
