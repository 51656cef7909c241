"""Experts in few bits inside a transformers model, and back from disk.

Letters: T tokens, K slots per token, E experts, D width.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.kernels import low_bit_mlp, sort_by_expert
from coterie.nn import QuantizedExperts
from coterie.nn.quantized_experts import TENSORS


class PackedExperts(nn.Module):
    """A packed bank behind transformers' experts interface, for inference.

    Args:
        packed: the experts.

    Returns (from forward, for hidden_states [T, D], top_k_index and top_k_weights [T, K]): [T, D]. An index
    outside 0 … E-1 is a slot that is not computed.
    """

    def __init__(self, packed: QuantizedExperts) -> None:
        super().__init__()
        self.packed, self.num_experts = packed, packed.num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        outside_TK = (top_k_index < 0) | (top_k_index >= self.num_experts)
        return low_bit_mlp(
            hidden_states,
            top_k_weights,
            sort_by_expert(top_k_index.long().masked_fill(outside_TK, -1), self.num_experts),
            self.packed.packed(),
            self.packed.b_in,
            self.packed.b_out,
            activation=self.packed.activation,
        )


def with_packed(base: type[PreTrainedModel], file: Path) -> type[PreTrainedModel]:
    """A model's class that builds packed banks where a `coterie-packed.json` says so.

    Raises ValueError if the file is damaged or of another version.
    """
    layouts = read_layouts(file)

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        with torch.device("cpu"):  # from_pretrained builds on "meta", where no kernel can look
            for name, layout in layouts.items():
                set_bank(self, name, PackedExperts(QuantizedExperts.from_layout(layout)))

    # the same name and module: transformers finds a family's weight names by them
    packed: Any = type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})
    return packed  # type: ignore[no-any-return]


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


def set_bank(model: nn.Module, name: str, bank: nn.Module) -> None:
    """Puts a module in the place of the one of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, bank)


def check_dtypes(model: PreTrainedModel) -> None:
    """Raises ValueError if packed tensors were cast on the way: their codes would mean something else."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            for tensor, dtype in TENSORS.items():
                found = getattr(module, tensor).dtype
                if found != dtype:
                    raise ValueError(f"{name}.{tensor} is {found}; packed experts need {dtype}")
