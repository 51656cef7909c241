"""The tensors of any model in one safetensors file, tied ones once."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coterie.data import written_whole


def save_weights(model: nn.Module, file: str | Path) -> Path:
    """Writes parameters and buffers; what is tied is stored once, under its first name.

    The file appears whole or not at all. It holds no configuration: build the model and tie it
    (`tie_depth`) as it was, then `load_weights`. A `Decoder` that transformers shall load is for
    `save_pretrained`.

    >>> import tempfile
    >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3))
    >>> layers[2][0] = layers[1][0] = layers[0][0]
    >>> file = save_weights(layers, Path(tempfile.mkdtemp(), "tied.safetensors"))
    >>> len(load_file(file))
    8
    """
    file = Path(file)
    with written_whole(file) as draft:
        save_file({name: t.detach().contiguous() for name, t in _stored(model).items()}, draft)
    return file


@torch.no_grad()
def load_weights(model: nn.Module, file: str | Path) -> None:
    """Reads what `save_weights` wrote into a model of the same sizes, depth and tying, in place.

    Raises:
        ValueError: no such file, or of another model: says which tensors of which layers are missing, left
            over or of another shape. The model is then as it was.
    """
    if not Path(file).is_file():
        raise ValueError(f"{file} does not exist; give a file that save_weights wrote")
    mine, saved = _stored(model), load_file(file)
    reshaped = [n for n in mine if n in saved and saved[n].shape != mine[n].shape]
    faults = [
        *_fault("it lacks", mine.keys() - saved.keys(), mine),
        *_fault("this model has no place for its", saved.keys() - mine.keys(), saved),
        *_fault("of another shape are", reshaped, mine),
    ]
    if faults:
        raise ValueError(
            f"{file} is of another model: {'; '.join(faults)}. Build the model with the sizes and the depth "
            "it was saved with, and tie its layers alike"
        )
    for name, tensor in mine.items():
        tensor.copy_(saved[name])


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Every distinct tensor of the model's state under the first of its names."""
    first = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if first[id(t)] == name}


def _fault(what: str, names: Iterable[str], order: Mapping[str, Tensor]) -> list[str]:
    """One sentence on these tensors, or none: "it lacks norm1.weight, norm1.bias of layers 4, 5"."""
    wanted = set(names)
    layers_of: dict[str, list[str]] = {}  # tensor within a layer → the layers it is meant in
    for name in order:
        if name in wanted:
            inside = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", name)
            layers_of.setdefault(inside[2] if inside else name, []).extend([inside[1]] if inside else [])
    tensors_of: dict[str, list[str]] = {}  # layers → the tensors that all of them are meant in
    for tensor, layers in layers_of.items():
        tensors_of.setdefault(", ".join(layers), []).append(tensor)
    groups = [
        ", ".join(tensors) + (f" of layers {layers}" if layers else "")
        for layers, tensors in tensors_of.items()
    ]
    return [f"{what} {', and '.join(groups)}"] if groups else []
