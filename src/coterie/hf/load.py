"""Loading a model from a folder, in the format of transformers or of coterie."""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel

from coterie.hf.blocks import find_moe_blocks
from coterie.hf.packed import check_dtypes, with_packed
from coterie.hf.save import MANIFEST, PACKED
from coterie.hf.top_any import MASKS, check_unmasked, read_masks

INDEX = "model.safetensors.index.json"


def load(folder: Path | str, **options: Any) -> PreTrainedModel:
    """Loads the model that `coterie.hf.save` wrote, in either format, or any other with safetensors.

    Args:
        folder: with config.json and safetensors.
        options: those of `from_pretrained`, such as dtype, device_map, experts_implementation.

    Returns the model, in evaluation mode, of the class that config.json names. Experts in few bits, as
    `coterie quantize` writes them, stay packed; masks of experts per token, as `coterie top-any` writes them,
    are in place.

    Raises ValueError if a file is missing or damaged, the class is not one of transformers, or the tensors
    are not those that config.json asks for.
    """
    folder = Path(folder)
    check_files(folder)
    built = base = model_class(folder)
    if (folder / PACKED).exists():
        built = with_packed(base, folder / PACKED)
    model: PreTrainedModel
    # transformers' own error for shapes is a table in the log; with this it returns them
    options = {"ignore_mismatched_sizes": True, **options}
    model, found = built.from_pretrained(folder, output_loading_info=True, **options)
    for name, stored, asked in sorted(found["mismatched_keys"]):
        raise ValueError(f"{folder}: {name} has shape {list(stored)}, config.json asks {list(asked)}")
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would leave them at random values
        raise ValueError(f"{folder} lacks {len(missing)} of the model's tensors, such as {missing[0]}")
    if (folder / MANIFEST).exists():
        model.__class__ = base.__base__
    check_dtypes(model)
    read_masks(folder, model)
    return model


def outline(folder: Path | str, *, packed: bool = False) -> PreTrainedModel:
    """The model that `load(folder, dtype="auto")` would load, on the meta device; no weight is read.

    Args:
        folder: of the model.
        packed: take one with packed experts, too, as it was before.

    Raises ValueError as `read_editable`.
    """
    folder = Path(folder)
    config = read_editable(folder, packed=packed)
    with torch.device("meta"):
        make = model_class(folder)._from_config
        model: PreTrainedModel = make(config, dtype=config.dtype or stored_dtype(shards(folder)))
    model.train(False)
    return model


def read_config(folder: Path | str) -> Any:
    """The configuration in a model's folder.

    Raises ValueError, in one line, if transformers does not know such a model.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:  # transformers adds advice over several lines
        raise ValueError(f"{folder}: {str(error).strip().splitlines()[0]}") from None
    except StrictDataclassError as error:  # a field of another type
        raise ValueError(f"{folder}: config.json: {' '.join(str(error).split())}") from None


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """That of the first floating-point tensor in these safetensors files."""
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, the file is no dict
                dtype: torch.dtype = file.get_tensor(name).dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.float32


def read_editable(folder: Path | str, *, packed: bool = False) -> Any:
    """The configuration in the folder of a model whose experts are numbers that can be read and edited.

    Raises ValueError if a file is missing or damaged, the model is unknown, its weights are quantised, its
    experts packed (unless `packed`), or masked per token, which an edit of the weights would make wrong.
    """
    folder = Path(folder)
    check_files(folder)
    if not packed:
        _check_unpacked(folder)
    check_unmasked(folder)
    config = read_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantised; save it dequantised first")
    return config


def _check_unpacked(folder: Path) -> None:
    if (folder / PACKED).exists():
        raise ValueError(
            f"the experts in {folder} are packed, and cannot be edited; work on the checkpoint that it was "
            "made from"
        )


def check_files(folder: Path | str) -> None:
    """Reads config.json, the index and the header of every safetensors file, not the weights.

    Raises ValueError, naming the file, if one is missing or damaged.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(
            f"{folder} does not exist; name a folder with config.json and safetensors files. "
            "A model of the Hub has to be there first: hf download NAME --local-dir FOLDER"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; it is not a model's folder{_other_weights(folder)}")
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
        content = _read_json(index)
        if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
            raise ValueError(f'{index} is damaged: it has no "weight_map", the file of each tensor')
        return sorted({folder / name for name in content["weight_map"].values()})
    found = sorted(file for file in folder.glob("*.safetensors") if file.name != MASKS)
    if not found:
        raise ValueError(f"{folder} has no safetensors files{_other_weights(folder)}")
    return found


def _other_weights(folder: Path) -> str:
    """Advice for weights in a format that is not read: the end of an error message."""
    paths = folder.iterdir() if folder.is_dir() else [folder]
    names = sorted(path.name for path in paths if path.suffix in (".bin", ".gguf", ".pt", ".pth"))
    if not names:
        return ""
    return f"; {names[0]} is not read: load it with transformers, and save_pretrained writes safetensors"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def model_class(folder: Path) -> Any:
    """The class that config.json names; where layers differ, one of the same name that builds them so.

    Raises ValueError if transformers has no such class.
    """
    config = read_config(folder)
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
