"""Loading a model from a folder, in the format of transformers or of coterie."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel

from coterie.hf.blocks import find_moe_blocks
from coterie.hf.save import MANIFEST, PACKED


def load(folder: Path | str, **options: Any) -> PreTrainedModel:
    """Loads the model that `coterie.hf.save` wrote, in either format, or any other with safetensors.

    Args:
        folder: with config.json and safetensors.
        options: those of `from_pretrained`, such as dtype, device_map, experts_implementation.

    Returns the model, in evaluation mode, of the class that config.json names.

    Raises ValueError if a file is missing or damaged, the class is not one of transformers, or the experts
    are packed.
    """
    folder = Path(folder)
    check_files(folder)
    if (folder / PACKED).exists():
        raise ValueError(f"the experts in {folder} are packed; coterie.shrink.load_packed loads it")
    model_class = _model_class(folder)
    manifest = folder / MANIFEST
    if manifest.exists():
        model_class = _with_blocks(model_class, json.loads(manifest.read_text())["blocks"])
    model: PreTrainedModel = model_class.from_pretrained(folder, **options)
    if manifest.exists():
        model.__class__ = model_class.__base__
    return model


def outline(folder: Path | str) -> PreTrainedModel:
    """The model that `load` would load, on the meta device: names, shapes and numbers, no weight is read.

    Raises ValueError as `load`.
    """
    folder = Path(folder)
    check_files(folder)
    model_class, manifest = _model_class(folder), folder / MANIFEST
    if manifest.exists():
        model_class = _with_blocks(model_class, json.loads(manifest.read_text())["blocks"])
    with torch.device("meta"):
        model: PreTrainedModel = model_class(AutoConfig.from_pretrained(folder))
    model.train(False)
    return model


def check_files(folder: Path | str) -> None:
    """Reads config.json, the index and the header of every safetensors file, not the weights.

    Raises ValueError, naming the file, if one is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; it is not a model's folder")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_read_json(index)["weight_map"].values()))
    else:
        shards = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if not shards:
        raise ValueError(f"{folder} has no safetensors files")
    for shard in shards:
        if not (folder / shard).is_file():
            raise ValueError(f"{folder / shard} is missing; {index.name} lists it")
        try:
            with safe_open(folder / shard, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / shard} is damaged: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _model_class(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    names = config.architectures or ["none"]
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    found = getattr(module, names[0], None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"{folder}: config.json names the class {names[0]}, which {module.__name__} lacks")
    return found


def _with_blocks(model_class: Any, numbers: dict[str, dict[str, int]]) -> Any:
    """A model class whose blocks have the given numbers from the start, so that their weights load."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        for block in find_moe_blocks(self):
            block.resize(**numbers[block.name])

    # the same name and module: transformers finds a family's weight names by them
    return type(
        model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__}
    )
