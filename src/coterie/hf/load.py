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
from coterie.hf.top_any import MASKS, check_unmasked, read_masks

INDEX = "model.safetensors.index.json"


def load(folder: Path | str, **options: Any) -> PreTrainedModel:
    """Loads the model that `coterie.hf.save` wrote, in either format, or any other with safetensors.

    Args:
        folder: with config.json and safetensors.
        options: those of `from_pretrained`, such as dtype, device_map, experts_implementation.

    Returns the model, in evaluation mode, of the class that config.json names. Masks of experts per token
    that the folder holds, as `coterie top-any` writes them, are in place.

    Raises ValueError if a file is missing or damaged, the class is not one of transformers, or the experts
    are packed.
    """
    folder = Path(folder)
    check_files(folder)
    if (folder / PACKED).exists():
        raise ValueError(f"the experts in {folder} are packed; coterie.shrink.load_packed loads it")
    built = model_class(folder)
    model: PreTrainedModel
    model, found = built.from_pretrained(folder, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would leave them at random values
        raise ValueError(f"{folder} lacks {len(missing)} of the model's tensors, such as {missing[0]}")
    if (folder / MANIFEST).exists():
        model.__class__ = built.__base__
    read_masks(folder, model)
    return model


def outline(folder: Path | str) -> PreTrainedModel:
    """The model that `load` would load, on the meta device: names, shapes and numbers, no weight is read.

    Raises ValueError as `load`, but for packed experts; or if the folder has masks, which an edit of the
    weights would make wrong.
    """
    folder = Path(folder)
    check_files(folder)
    check_unmasked(folder)
    with torch.device("meta"):
        model: PreTrainedModel = model_class(folder)(AutoConfig.from_pretrained(folder))
    model.train(False)
    return model


def check_files(folder: Path | str) -> None:
    """Reads config.json, the index and the header of every safetensors file, not the weights.

    Raises ValueError, naming the file, if one is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; it is not a model's folder")
    _read_json(folder / "config.json")
    for shard in shards(folder):
        if not shard.is_file():
            raise ValueError(f"{shard} is missing; {INDEX} lists it")
        try:
            with safe_open(shard, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{shard} is damaged: {error}") from None


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: those that its index lists, or all where there is none.

    Raises ValueError if the index is damaged, or there is no such file.
    """
    index = folder / INDEX
    if index.is_file():
        return sorted({folder / name for name in _read_json(index)["weight_map"].values()})
    found = sorted(file for file in folder.glob("*.safetensors") if file.name != MASKS)
    if not found:
        raise ValueError(f"{folder} has no safetensors files")
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def model_class(folder: Path) -> Any:
    """The class that config.json names; where layers differ, one of the same name that builds them so.

    Raises ValueError if transformers has no such class.
    """
    config = AutoConfig.from_pretrained(folder)
    names = config.architectures or ["none"]
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    found = getattr(module, names[0], None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"{folder}: config.json names the class {names[0]}, which {module.__name__} lacks")
    manifest = folder / MANIFEST
    return _with_blocks(found, _read_json(manifest)["blocks"]) if manifest.exists() else found


def _with_blocks(base: Any, numbers: dict[str, dict[str, int]]) -> Any:
    """A model class whose blocks have the given numbers from the start, so that their weights load."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        for block in find_moe_blocks(self):
            block.resize(**numbers[block.name])

    # the same name and module: transformers finds a family's weight names by them
    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})
