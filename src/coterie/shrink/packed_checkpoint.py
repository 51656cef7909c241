"""Packed experts on disk: whole models, by `save_packed` and `load_packed`, and single banks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from coterie.data import written_whole
from coterie.hf import MoEBlock, check_files
from coterie.hf.load import model_class
from coterie.hf.save import MANIFEST, PACKED, check_output, manifest
from coterie.hf.top_any import read_masks, unmasked, write_masks
from coterie.shrink.experts import TENSORS, QuantizedExperts
from coterie.shrink.packed_blocks import PackedExperts, set_bank


def save_packed(model: PreTrainedModel, blocks: Sequence[MoEBlock], folder: Path | str) -> None:
    """Writes a model whose experts were packed to a new folder, which appears whole or not at all.

    Packed tensors go into the safetensors files as they are; what they do not say goes into
    `coterie-packed.json`, the blocks' numbers into `coterie.json`.

    Args:
        model: with packed blocks.
        blocks: as they were found before they were packed.
        folder: must not exist yet, or be empty; not the one that the model came from.

    Raises ValueError, before anything is written, if the folder is taken or no block is packed.
    """
    folder = Path(folder)
    check_output(folder, model.name_or_path or "")
    layouts = {
        name: bank_layout(module.packed)
        for name, module in model.named_modules()
        if isinstance(module, PackedExperts)
    }
    if not layouts:
        raise ValueError(f"no block of {type(model).__name__} is packed; coterie.hf.save writes it")
    with written_whole(folder) as whole:
        with unmasked(model):
            model.save_pretrained(whole)
        write_masks(model, whole)
        (whole / MANIFEST).write_text(manifest(blocks))
        (whole / PACKED).write_text(layouts_text(layouts))


def load_packed(folder: Path | str, **options: Any) -> PreTrainedModel:
    """Loads what `save_packed` wrote; the experts stay packed.

    Args:
        folder: written by `save_packed` or `coterie quantize`.
        options: those of `from_pretrained`, such as dtype.

    Returns the model, in evaluation mode, of the class that config.json names, with the masks of experts per
    token that the folder holds.

    Raises ValueError if the folder has no packed experts, or a file or tensor is missing or damaged.
    """
    folder = Path(folder)
    check_files(folder)
    if not (folder / PACKED).is_file():
        raise ValueError(f"{folder} has no {PACKED}: its experts are not packed; coterie.hf.load loads it")
    layouts = read_layouts(folder / PACKED)
    base = model_class(folder)  # builds blocks of the sizes in coterie.json

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        with torch.device("cpu"):  # from_pretrained builds on "meta", where no kernel can look
            for name, layout in layouts.items():
                set_bank(self, name, PackedExperts(QuantizedExperts.from_layout(layout)))

    # the same name and module: transformers finds a family's weight names by them
    packed: Any = type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})
    model: PreTrainedModel
    model, found = packed.from_pretrained(folder, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would leave them at what they were built with
        raise ValueError(f"{folder} lacks {len(missing)} of the model's tensors, such as {missing[0]}")
    model.__class__ = base.__base__  # the class in transformers
    _check_dtypes(model)
    read_masks(folder, model)
    return model


def save_bank(bank: QuantizedExperts, file: Path) -> None:
    """Writes one packed bank to a file of its own, which appears whole or not at all."""
    with written_whole(file) as draft:
        tensors = {name: t.contiguous() for name, t in bank.state_dict().items()}
        save_file(tensors, draft, metadata={"layout": json.dumps(bank.layout())})


def load_bank(file: Path) -> QuantizedExperts:
    """Reads what `save_bank` wrote."""
    with safe_open(file, "pt") as stored:
        bank = QuantizedExperts.from_layout(json.loads(stored.metadata()["layout"]))
        bank.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    return bank


def bank_layout(bank: QuantizedExperts) -> dict[str, Any]:
    """What `coterie-packed.json` says of one bank."""
    return {"bits": bank.bits, **bank.layout()}


def layouts_text(layouts: dict[str, dict[str, Any]]) -> str:
    """The content of `coterie-packed.json`: name of a bank in the model → its `bank_layout`."""
    return json.dumps({"version": 1, "banks": layouts}) + "\n"


def read_layouts(file: Path) -> dict[str, dict[str, Any]]:
    """Name of a bank in the model → its layout; ValueError if the file is damaged or of another version."""
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if content.get("version") != 1:
        raise ValueError(f"{file} has version {content.get('version')}; this coterie reads version 1")
    layouts: dict[str, dict[str, Any]] = content["banks"]
    return layouts


def _check_dtypes(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            for tensor, dtype in TENSORS.items():
                found = getattr(module, tensor).dtype
                if found != dtype:
                    raise ValueError(f"{name}.{tensor} is {found}; packed experts need {dtype}")
