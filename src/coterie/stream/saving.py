"""A DriftMoE model in a folder, and back."""

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coterie.models import load_estimator, save_estimator
from coterie.stream.hoeffding import HoeffdingTrees

if TYPE_CHECKING:
    from coterie.stream.driftmoe import DriftMoEClassifier

_PLAIN = (bool, int, float, str)


def save(model: "DriftMoEClassifier", folder: str | Path) -> Path:
    """What `DriftMoEClassifier.save` says."""
    parameters = model._get_params()
    parameters.pop("expert")
    for label in model.classes_:
        if not isinstance(label, _PLAIN):
            raise ValueError(
                f"label {label!r} is a {type(label).__name__}; only numbers and texts can be saved"
            )
    learnt = {
        "classes": model.classes_,
        "rows_of_class": model._labels.rows,
        "fixed": model._labels.fixed,
        "features": model._features,
        "columns": model._columns.names,
        "rows_seen": model.rows_seen_,
        "warned": model._labels.warned,
        "rng": model._rng.bit_generator.state,
        "given_experts": model.expert is not None,
    }
    arrays = {"answered": model._answered_E, "right": model._right_E}
    if model.router_ is not None:
        arrays |= {f"router.{name}": array for name, array in model.router_.to_arrays().items()}
        if isinstance(model.experts_, HoeffdingTrees):
            arrays |= {f"experts.{name}": array for name, array in model.experts_.to_arrays().items()}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    if model.expert is not None:
        given = bytearray(pickle.dumps((model.expert, model.experts_)))
        tensors["pickle"] = torch.frombuffer(given, dtype=torch.uint8)
    return save_estimator(folder, type(model).__name__, parameters=parameters, learnt=learnt, tensors=tensors)


def load(cls: "type[DriftMoEClassifier]", folder: str | Path, *, trusted: bool) -> "DriftMoEClassifier":
    """What `DriftMoEClassifier.load` says."""
    parameters, learnt, tensors = load_estimator(folder, cls.__name__)
    expert, experts = None, None
    if learnt["given_experts"]:
        if not trusted:
            raise ValueError(
                f"{folder} holds experts as a pickle, which can run any program; if the folder is your own, "
                "load it with trusted=True"
            )
        expert, experts = pickle.loads(tensors.pop("pickle").numpy().tobytes())
    classes = parameters.pop("classes")
    model = cls(**parameters, classes=None if classes is None else tuple(classes), expert=expert)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    model._labels.set(learnt["classes"], learnt["rows_of_class"], learnt["fixed"], learnt["warned"])
    model._features = learnt["features"]
    for feature, value in learnt["columns"]:
        model._columns.add((feature, value))
    if "router.state" in arrays:
        model._make_room()
        assert model.router_ is not None
        model.router_.set_arrays(_part(arrays, "router."))
        if isinstance(model.experts_, HoeffdingTrees):
            model.experts_.set_arrays(_part(arrays, "experts."))
        else:
            model.experts_ = experts
    model._answered_E, model._right_E = arrays["answered"], arrays["right"]
    model.rows_seen_ = learnt["rows_seen"]
    model._rng.bit_generator.state = learnt["rng"]
    return model


def _part(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
