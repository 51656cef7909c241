"""Tying across depth: the layers of a stack share modules, and with them parameters.

Works on any list of layers alike: `model.layers` of a `Decoder` or a `ViT`, or one's own.
"""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from torch import nn


def tie_depth(layers: Iterable[nn.Module], names: Sequence[str]) -> None:
    """Gives every layer the first layer's modules of these names, in place; all others stay private.

    Name what is shared and leave the norms out, so that each depth scales and shifts what the shared modules
    read. Shared modules are one object: they are stored once, listed to an optimizer once, and get the sum of
    the gradients of all depths.

    Args:
        layers: at least one, such as `model.layers`.
        names: of modules within a layer, dotted where they are nested: "self_attn", "mlp", "mlp.experts".

    Raises:
        ValueError: a layer lacks such a module, or has it with other tensors or settings (another number of
            experts, another k) than the first, which one object cannot be. The layers are then as they were.
            Attention in transformers knows its layer's index, for its cache: there, name its projections.

    Source: Lan et al. 2019 (ALBERT), section 3.1; with private norms, Xue et al. 2021 (WideNet), section 3.

    >>> from coterie.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(50, dim=16, layers=3, heads=2, kv_heads=1, head_dim=8, hidden=32))
    >>> tie_depth(model.layers, ["self_attn", "mlp"])
    >>> model.layers[0].mlp is model.layers[2].mlp
    True
    >>> count_parameters(model), count_parameters(model, unique=False)
    (3232, 8672)
    """
    first, *others = layers
    for name in names:
        shared = _module(first, 0, name)
        for depth, layer in enumerate(others, start=1):
            _check_alike(name, depth, shared, _module(layer, depth, name))
    for name in names:
        parent, _, child = name.rpartition(".")
        for layer in others:
            setattr(layer.get_submodule(parent), child, first.get_submodule(name))


def tied_modules(layers: Iterable[nn.Module]) -> list[str]:
    """Names of the modules that are one object in all of at least two layers; of nested ones, the outermost.

    >>> one = nn.Linear(2, 2)
    >>> tied_modules([nn.Sequential(one, nn.ReLU()), nn.Sequential(one, nn.ReLU())])
    ['0']
    """
    modules = [dict(layer.named_modules(remove_duplicate=False)) for layer in layers]
    tied: list[str] = []
    if len(modules) > 1:
        for name, module in modules[0].items():
            inside = any(name.startswith(f"{outer}.") for outer in tied)
            if not inside and all(other.get(name) is module for other in modules):
                tied.append(name)
    return tied


def count_parameters(model: nn.Module, *, unique: bool = True) -> int:
    """How many parameters a model holds.

    Args:
        unique: count a tied tensor once, which is what is stored; False counts it at every place where it is
            used, which is what the model would hold untied.
    """
    return sum(p.numel() for _, p in model.named_parameters(remove_duplicate=unique))


def _module(layer: nn.Module, depth: int, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(layer.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        children = ", ".join(child for child, _ in layer.named_children())
        raise ValueError(f"layer {depth} has no module {name!r}; it has {children}")
    return modules[name]


def _check_alike(name: str, depth: int, shared: nn.Module, other: nn.Module) -> None:
    pairs = zip_longest(_facts(shared).items(), _facts(other).items(), fillvalue=("nothing there", None))
    for (what, value), (other_what, other_value) in pairs:
        if (what, value) != (other_what, other_value):
            raise ValueError(
                f"{name} of layer {depth} cannot be that of layer 0: "
                f"{other_what} = {other_value} there, {what} = {value} in layer 0"
            )


def _facts(module: nn.Module) -> dict[str, Any]:
    """What two modules must have in common to be one: kinds, tensors' shapes, plain settings."""
    facts: dict[str, Any] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        plain = {k: v for k, v in vars(part).items() if v is None or isinstance(v, (int, float, str))}
        for key, value in {"__class__": type(part).__name__, **plain}.items():
            if key == "__class__" or (key != "training" and not key.startswith("_")):
                facts[f"{path}.{key}".lstrip(".")] = value
    tensors = module.state_dict()
    return facts | {f"the shape of {key}": tuple(tensor.shape) for key, tensor in tensors.items()}
