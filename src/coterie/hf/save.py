"""Saving an edited model: for plain transformers, or with one expert count per layer."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from transformers import PreTrainedModel

from coterie.data import check_writable, written_whole
from coterie.hf.blocks import MoEBlock, find_moe_blocks
from coterie.hf.layout import FIELDS
from coterie.hf.top_any import masks_of, unmasked, write_masks

Format = Literal["transformers", "coterie"]
MANIFEST = "coterie.json"
PACKED = "coterie-packed.json"  # beside it where experts are packed: `coterie.hf.load` reads both
MASK = "kept_experts.json"  # of a checkpoint that was pruned: which experts of its source those are

# What a new checkpoint has of its own; weights in other formats would be those of the model before the edit.
_OWN = ("config.json", MANIFEST, PACKED, MASK, "report.html")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
_TEMPLATES = "additional_chat_templates"


def save(model: PreTrainedModel, folder: Path | str, format: Format = "transformers") -> None:
    """Writes a model to a new folder, which appears whole or not at all.

    Args:
        model: with MoE blocks, edited or not.
        folder: must not exist yet, or be empty; not the one that the model came from.
        format: "transformers" is read by plain `from_pretrained`, without coterie. "coterie" also allows
            layers to differ in experts, top_k and routing groups, and to have masks (`place_masks`): the same
            files and a manifest, `coterie.json`, read by `coterie.hf.load`.

    Raises ValueError, before anything is written, if the folder is taken or the format cannot express the
    model.
    """
    check_format(format)
    folder = Path(folder)
    check_output(folder, model.name_or_path or "")
    blocks = find_moe_blocks(model)
    if format == "transformers":
        check_expressible(blocks, [block.num_experts for block in blocks])
        if masks_of(model):
            raise ValueError(
                f"the experts per token of this {type(model).__name__} are masked, which transformers cannot "
                'do; use format="coterie"'
            )
    with written_whole(folder) as whole:
        with unmasked(model):
            model.save_pretrained(whole)
        if format == "coterie":
            (whole / MANIFEST).write_text(manifest(blocks))
            write_masks(model, whole)


def manifest(blocks: Sequence[MoEBlock]) -> str:
    """The numbers of each block as JSON: the content of `coterie.json`."""
    numbers = {b.name: {what: getattr(b.layout, what) for what in FIELDS} for b in blocks}
    return json.dumps({"version": 1, "blocks": numbers}, indent=1) + "\n"


def copy_side_files(source: Path, folder: Path) -> None:
    """Copies what a model's folder holds beside configuration and weights.

    These are the tokenizer, chat templates, the settings of generation, licence and model card, as they are.

    Args:
        source: of the model that was edited.
        folder: of the new one.
    """
    for path in sorted(source.iterdir()):
        hidden = path.name.startswith(".")
        if path.is_dir() and path.name == _TEMPLATES:
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.is_file() and not hidden and path.name not in _OWN and not path.name.endswith(_WEIGHTS):
            shutil.copy2(path, folder)


def check_expressible(blocks: Sequence[MoEBlock], num_experts: Sequence[int]) -> None:
    """Whether plain transformers could load the blocks with these expert counts; ask before the work begins.

    Args:
        blocks: of one model.
        num_experts: of each block after an edit.

    Raises ValueError if blocks that take their numbers from one configuration would differ.
    """
    first: dict[int, tuple[str, dict[str, int]]] = {}
    for block, count in zip(blocks, num_experts, strict=True):
        numbers = {what: getattr(block.layout, what) for what in FIELDS} | {"num_experts": count}
        name, others = first.setdefault(id(block.config), (block.name, numbers))
        for what, number in numbers.items():
            if others[what] != number:
                raise ValueError(
                    f"{name} has {what}={others[what]} and {block.name} has {number}; "
                    f"{type(block.config).__name__} holds one number for all layers. "
                    'Make them equal or use format="coterie"'
                )


def check_format(format: str) -> None:
    """Raises ValueError if there is no such format."""
    if format not in get_args(Format):
        raise ValueError(f"format={format!r} is unknown; use one of {', '.join(get_args(Format))}")


def check_output(folder: Path, source: str) -> None:
    """Raises ValueError if a model cannot be written to `folder`.

    Args:
        folder: the output.
        source: folder or name that the model came from.
    """
    if source and folder.resolve() == Path(source).resolve():
        raise ValueError(f"{folder} is the folder the model came from; choose another for the output")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; choose a new folder or remove it first")
    check_writable(folder)


def bytes_on_disk(folder: Path | str) -> int:
    """Of a model's safetensors files."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
