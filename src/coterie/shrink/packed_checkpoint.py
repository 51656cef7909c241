"""Packed experts on disk: whole models, which `coterie.hf.load` loads, and single banks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from coterie.data import written_whole
from coterie.hf import MoEBlock
from coterie.hf.packed import PackedExperts
from coterie.hf.save import MANIFEST, PACKED, check_output, manifest
from coterie.hf.top_any import unmasked, write_masks
from coterie.nn import QuantizedExperts


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
