"""A checkpoint on disk as a model without weights, any part of which can be loaded and dropped again.

Names and forms of the tensors on disk differ from those in the model (one matrix per expert, other
prefixes); transformers' own conversions are applied to the part that is loaded.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from coterie.hf import modules
from coterie.hf.blocks import MoEBlock, find_moe_blocks
from coterie.hf.layout import join
from coterie.hf.load import model_class, read_editable, shards, stored_dtype

SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers asks the environment


class Checkpoint:
    """A folder of safetensors, and its model on the meta device.

    Args:
        folder: with config.json and safetensors.
        options: of the model's making, such as attn_implementation, experts_implementation.

    Attributes:
        folder: as given.
        model: in evaluation mode; its weights are on the meta device except where `load` has been called.
        blocks: its MoE blocks.
        stack: name of the list of decoder layers that the blocks are in, such as "model.layers".

    Raises ValueError if files are missing or damaged, the weights are quantised, there is no MoE block, the
    blocks are not in one stack of layers, or there are masks of experts per token.
    """

    def __init__(self, folder: Path | str, **options: Any) -> None:
        self.folder = Path(folder)
        config = read_editable(folder)
        self._shard_of = {name: path for path in shards(self.folder) for name in _names(path)}
        with torch.device("meta"):
            dtype = config.dtype or stored_dtype(shards(self.folder))
            make = model_class(self.folder)._from_config
            self.model: PreTrainedModel = make(config, dtype=dtype, **options).eval()
        for name, buffer in list(self.model.named_non_persistent_buffers()):
            modules.set_tensor(self.model, name, torch.empty_like(buffer, device="cpu"))
        self.model.initialize_weights()  # computes those buffers; on "meta" it does nothing
        self.blocks: list[MoEBlock] = find_moe_blocks(self.model)
        self.stack = _stack(self.blocks)
        head = self.model.get_output_embeddings()
        self._head = next((name for name, m in self.model.named_modules() if m is head), "no head")
        self._empty = {name: t for name, t in self.model.state_dict(keep_vars=True).items() if t.is_meta}
        self._stored_as = self._find_stored()

    @property
    def layers(self) -> list[str]:
        """Names of the decoder layers, in order of depth."""
        return [f"{self.stack}.{i}" for i, _ in enumerate(self.model.get_submodule(self.stack).children())]

    @property
    def parts(self) -> list[str]:
        """Everything that `load` takes and the checkpoint has tensors of."""
        return list(self._stored_as)

    def layer_of(self, block: MoEBlock) -> str:
        """The name of the decoder layer that a block is in."""
        return self._part(f"{block.name}.")

    @contextmanager
    def loaded(self, part: str) -> Iterator[nn.Module]:
        """The module of that name, loaded while the context is open, as `load` and `drop` do.

        Its blocks may be edited: the configuration, which other layers share, is then put back, and the
        blocks' layouts remember their new numbers.
        """
        self.load(part)
        before = [(block.config, dict(vars(block.config))) for block in self.blocks]
        yield self.model.get_submodule(part)
        for config, numbers in before:
            vars(config).update(numbers)
        self.drop(part)

    def load(self, part: str) -> None:
        """Loads the tensors of one module, such as "model.layers.3" or "lm_head"; of all others for "".

        Raises ValueError if one is missing, or has another shape than the configuration says.
        """
        wanted = {name for name in self._empty if self._part(name) == part}
        load_config = LoadStateDictConfig(
            dtype=self.model.dtype,
            dtype_plan=self.model._get_dtype_plan(self.model.dtype),
            weight_mapping=get_model_conversion_mapping(self.model),  # type: ignore[arg-type]
        )
        with self.stored(part) as tensors, _one_by_one():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, load_config)
        for name, found, right in sorted(info.mismatched_keys):
            raise ValueError(f"{self.folder}: {name} has shape {list(found)}, config.json asks {list(right)}")
        for name, message in info.conversion_errors.items():
            raise ValueError(f"{self.folder}: {name} cannot be loaded: {message.strip().splitlines()[-1]}")
        lost = sorted((info.missing_keys & wanted) - set(self.model.all_tied_weights_keys))
        if lost:
            raise ValueError(f"{self.folder} lacks {lost[0]}, which config.json asks for")

    def drop(self, part: str) -> None:
        """Frees what `load` loaded."""
        for name, empty in self._empty.items():
            if self._part(name) == part:
                modules.set_tensor(self.model, name, empty)

    @contextmanager
    def stored(self, part: str) -> Iterator[dict[str, Any]]:
        """The tensors on disk that a part is made of, by their names there, each read when it is indexed.

        Yields a mapping to slices of safetensors, which are readable while the context is open.
        """
        names = self._stored_as.get(part, [])
        # read, not mapped: the pages of a mapped file would count as this process's memory until it is closed
        files = {
            path: safe_open(path, "pt", backend="pread")
            for path in sorted({self._shard_of[name] for name in names})
        }
        yield {name: files[self._shard_of[name]].get_slice(name) for name in names}  # type: ignore[no-untyped-call]

    def as_stored(self, part: str) -> dict[str, Tensor]:
        """The tensors of a loaded part in the names and forms that they have on disk."""
        holder = self.model.get_submodule(part)
        state = {join(part, name): tensor for name, tensor in holder.state_dict().items()}
        with torch.no_grad():
            return dict(revert_weight_conversion(self.model, state))

    def _part(self, name: str) -> str:
        """What `load` loads a tensor of the model with: its decoder layer, the output head, or ""."""
        if name.startswith(f"{self._head}."):
            return self._head
        if not name.startswith(f"{self.stack}."):
            return ""
        return f"{self.stack}.{name[len(self.stack) + 1 :].split('.')[0]}"

    def _find_stored(self) -> dict[str, list[str]]:
        """Names on disk by the part of the model they are loaded into, without those the model lacks."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        found: dict[str, list[str]] = {}
        for name in self._shard_of:
            target, _ = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target = name
            if target in state:
                found.setdefault(self._part(target), []).append(name)
        return found


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _stack(blocks: list[MoEBlock]) -> str:
    """What precedes the layer's number in the names of all blocks."""
    stacks = set()
    for block in (b for first in blocks for b in (first, *first.also)):
        parts = block.name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        stacks.add(".".join(parts[: numbers[0]]) if numbers else "")
    if len(stacks) > 1 or "" in stacks:
        raise ValueError(f"the MoE blocks are not in one stack of layers but in {', '.join(sorted(stacks))}")
    tied = [block.name for block in blocks if block.also]
    if tied:
        raise ValueError(f"{tied[0]} shares its experts with other layers; load the whole model instead")
    return stacks.pop()


@contextmanager
def _one_by_one() -> Iterator[None]:
    """transformers reads a tensor when it converts it, not all in threads before; no progress bar."""
    shown, setting = logging.is_progress_bar_enabled(), os.environ.get(SEQUENTIAL)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    os.environ[SEQUENTIAL] = "1"
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if setting is None:
            del os.environ[SEQUENTIAL]
        else:
            os.environ[SEQUENTIAL] = setting
