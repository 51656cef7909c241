"""Reading and writing the tensors and the numbers of an MoE block in live modules and configurations."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from coterie.hf.layout import ATTRIBUTES, MISNAMED, BlockLayout, fields_of, read_field


def is_bank(module: nn.Module) -> bool:
    """Whether a module is a bank of experts with transformers' experts interface."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    return all(flag in vars(module) for flag in flags) and "down_proj" in module._parameters


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name."""
    holder, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(holder), leaf)
    return tensor


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Puts a tensor in the place of a parameter or buffer; returns what stands there now."""
    holder, _, leaf = name.rpartition(".")
    module = model.get_submodule(holder)
    old = getattr(module, leaf)
    if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, leaf, tensor)
    return tensor


def read_numbers(block: nn.Module, bank: Any) -> dict[str, int]:
    """top_k and the routing groups of a block, as its router has them: arguments of `block_layout`."""
    router = getattr(block, "gate", None) or getattr(block, "router", None)
    found = vars(router) if router is not None else {}
    config = found.get("config", bank.config)
    top_k = found["top_k"] if "top_k" in found else read_field(vars(config), "top_k")
    limited = found.get("topk_method", "group_limited_greedy") == "group_limited_greedy"
    groups = found.get("num_group") if limited else None
    if groups is None:
        return {"top_k": top_k}
    # by its best expert where the method has a name, by its two best elsewhere
    group_min = 1 if "topk_method" in found else 2
    return {"top_k": top_k, "groups": groups, "top_groups": found["topk_group"], "group_min": group_min}


def write_numbers(model: PreTrainedModel, layout: BlockLayout, bank: Any, changed: Mapping[str, int]) -> None:
    """Writes numbers of a block wherever the model remembers them.

    Args:
        model: the model.
        layout: the block's, already changed.
        bank: the block's bank of experts.
        changed: the numbers, by the keys of FIELDS.
    """
    block = model.get_submodule(layout.name)
    for module in _router_modules(model, layout):
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig):
            # some routers ask their configuration while they compute, and layers may come to differ
            own = copy.copy(config)
            write_fields(own, changed)
            vars(module)["config"] = own
        _write_attributes(module, {**changed, "rows": get_tensor(model, layout.router["rows"]).shape[0]})
    parent = model.get_submodule(layout.name.rpartition(".")[0])  # text and vision blocks share one
    for module in (bank, block, parent):
        _write_attributes(module, changed)
    write_fields(bank.config, changed)
    for owner in model.modules():
        if isinstance(owner, PreTrainedModel) and any(c is bank.config for c in configs(owner.config)):
            _write_attributes(owner, changed)


def write_fields(config: PretrainedConfig, changed: Mapping[str, int]) -> None:
    """Writes numbers, by the keys of FIELDS, into a configuration under its family's own names."""
    for what, number in changed.items():
        for field in fields_of(vars(config), what):
            setattr(config, field, number)


def configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A configuration and all inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from configs(value)


def _router_modules(model: nn.Module, layout: BlockLayout) -> list[nn.Module]:
    """The router, and the module in it that owns its rows, which may be the same."""
    inside = layout.router["rows"].removeprefix(f"{layout.name}.").split(".")[:-1]
    block = model.get_submodule(layout.name)
    first, last = block.get_submodule(inside[0]), block.get_submodule(".".join(inside))
    return [first] if first is last else [first, last]


def _write_attributes(module: nn.Module, changed: Mapping[str, int]) -> None:
    for what, attributes in ATTRIBUTES.items():
        for attribute in attributes:
            meaning = MISNAMED.get((type(module).__name__, attribute), what)
            if meaning in changed and isinstance(vars(module).get(attribute), int):
                setattr(module, attribute, changed[meaning])
