"""Masks that let a token use fewer experts than its router proposes: in a model for good, and on disk.

place_masks(model, {"model.layers.0.mlp.experts": PrefixMask(dim=64, k=4)}, renormalize=True)
save(model, folder, format="coterie")
model = load(folder)  # applies them in every pass

Letters: T tokens, K slots per token, D width, E experts.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from coterie.hf.calls import call_arguments, changed_call

MASKS = "coterie-top-any.safetensors"

# (tokens [T, D], combine weights [T, K], falling) → 1 for each slot that stays, 0 for others [T, K]
Mask = Callable[[Tensor, Tensor], Tensor]

_PLACE = "top_any"  # the name of a mask inside its bank


class PrefixMask(nn.Module):
    """Decides how many of a token's experts, 1 … K, run: those with the largest weights.

    z = W₂ [W₁ x ; g] + b scores the K prefixes, g being the weights. It starts at keeping all with odds of
    e² to 1, whatever the token. With a temperature, forward draws by straight-through Gumbel-softmax: a whole
    mask, with the gradient of the soft one; without, it takes the best score.

    Args:
        dim: width D of a token.
        k: K slots per token.

    Returns (from forward, for x [T, D] and falling weights [T, K]): mask [T, K] of 0 and 1.

    Raises ValueError, in forward, for another number of slots.

    Source: MC# (2025, arXiv 2510.10962), online top-any pruning; prefixes, W₁ and the start are our reading.

    >>> mask = PrefixMask(dim=8, k=4)
    >>> mask(torch.randn(2, 8), torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2)).tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    """

    def __init__(self, dim: int, k: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, k, bias=False)
        self.score = nn.Linear(2 * k, k)
        nn.init.zeros_(self.score.weight)
        with torch.no_grad():
            self.score.bias.copy_(F.one_hot(torch.tensor(k - 1), k) * 2.0)
        self.k = k
        self.temperature: float | None = None

    def forward(self, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        if weights_TK.shape[1] != self.k:
            raise ValueError(
                f"the mask was made for {self.k} experts per token, the router gives {weights_TK.shape[1]}"
            )
        x_TD, weights_TK = x_TD.to(self.down.weight), weights_TK.to(self.down.weight)
        z_TK = self.score(torch.cat((self.down(x_TD), weights_TK), 1))
        if self.temperature is None:
            chosen_TK = F.one_hot(z_TK.argmax(1), self.k).to(z_TK)
        else:
            chosen_TK = F.gumbel_softmax(z_TK, self.temperature, hard=True)
        # prefix r keeps slots 0 … r: slot j stays in prefixes j and longer
        mask_TK: Tensor = chosen_TK.flip(1).cumsum(1).flip(1)
        return mask_TK


def place_masks(model: PreTrainedModel, masks: Mapping[str, PrefixMask], *, renormalize: bool) -> None:
    """Puts masks into a model's banks for good: every forward pass applies them, as `top_any` does.

    They become parts of the banks, so that they move to other devices with the model. `coterie.hf.save`
    writes them, in the format "coterie"; `unmasked` takes them off for a while.

    Args:
        model: its banks may be packed.
        masks: name of a bank in the model, such as "model.layers.0.mlp.experts" → its mask.
        renormalize: give the weights that stay the sum that all had, as where the host's router normalises.

    Raises ValueError if the model has no such bank, or it has a mask already.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
    >>> place_masks(model, {"model.layers.0.mlp.experts": PrefixMask(16, 2)}, renormalize=True)
    >>> list(masks_of(model))
    ['model.layers.0.mlp.experts']
    """
    modules = dict(model.named_modules())
    for name in masks:
        if name not in modules:
            raise ValueError(f"there is a mask for {name}, which {type(model).__name__} has not")
        if _PLACE in modules[name]._modules:
            raise ValueError(f"{name} has a mask already; a second one would mask what the first leaves")
    for name, mask in masks.items():
        bank = modules[name]
        [device] = {t.device for t in (*bank.parameters(), *bank.buffers())}
        if device.type != "meta":  # as weights that are offloaded are
            mask.to(device)
        bank.add_module(_PLACE, _Placed(mask, renormalize, skip_masked_slots(bank, True)))
        bank.register_forward_pre_hook(_apply_placed, with_kwargs=True)


def masks_of(model: nn.Module) -> dict[str, PrefixMask]:
    """The masks that are placed in a model, by the names of their banks.

    >>> masks_of(nn.Linear(2, 2))
    {}
    """
    return {name: placed.mask for name, _, placed in _placed(model)}


@contextmanager
def unmasked(model: nn.Module) -> Iterator[None]:
    """The model without the masks that were placed in it, while the context is open.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
    >>> place_masks(model, {"model.layers.0.mlp.experts": PrefixMask(16, 2)}, renormalize=True)
    >>> with unmasked(model):
    ...     masks_of(model)
    {}
    """
    places = [(bank, placed) for _, bank, placed in _placed(model)]
    for bank, placed in places:
        del bank._modules[_PLACE]
        skip_masked_slots(bank, placed.skipped)
    try:
        yield
    finally:
        for bank, placed in places:
            bank.add_module(_PLACE, placed)
            skip_masked_slots(bank, True)


def write_masks(model: nn.Module, folder: Path) -> None:
    """Writes the masks that are placed in a model to a file of its own; without any, writes nothing."""
    places = _placed(model)
    if not places:
        return
    layout = {
        "version": 1,
        "masks": {
            name: {
                "dim": placed.mask.down.in_features,
                "k": placed.mask.k,
                "renormalize": placed.renormalize,
            }
            for name, _, placed in places
        },
    }
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, _, placed in places
        for key, tensor in placed.mask.state_dict().items()
    }
    save_file(tensors, folder / MASKS, metadata={"top_any": json.dumps(layout)})


def read_masks(folder: Path, model: PreTrainedModel) -> None:
    """Places the masks in the model that `write_masks` wrote to a folder; without the file, does nothing.

    Raises ValueError if the file is damaged, of another version, or of another model.
    """
    file = folder / MASKS
    if not file.exists():
        return
    try:
        with safe_open(file, "pt") as stored:
            layout = json.loads((stored.metadata() or {}).get("top_any", "{}"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if layout.get("version") != 1:
        raise ValueError(f"{file} has version {layout.get('version')}; this coterie reads version 1")
    for name, of in layout["masks"].items():
        mask = PrefixMask(of["dim"], of["k"])
        try:
            mask.load_state_dict({key: tensors[f"{name}.{key}"] for key in mask.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
        place_masks(model, {name: mask}, renormalize=of["renormalize"])


def check_unmasked(folder: Path) -> None:
    """Raises ValueError if a folder has masks: they were trained for its weights as they are."""
    if (folder / MASKS).exists():
        raise ValueError(
            f"the experts per token of {folder} are masked, for its weights as they are; work on the "
            f"checkpoint that it was made from, or on a copy without {MASKS}"
        )


def mask_slots(
    bank: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Mask, *, renormalize: bool
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """The arguments of a bank's call with the masked slots left out, and the mask [T, K].

    A masked slot has weight 0. Where no gradient is asked for its index becomes E, which `PackedExperts` and
    all implementations of transformers but "eager" do not compute: the loops of some families know no such
    slot, so there its expert runs in vain.
    """
    given = call_arguments(args, kwargs)
    weights_TK, experts_TK = given["top_k_weights"], given["top_k_index"]
    falling_TK, order_TK = weights_TK.sort(1, descending=True)
    sorted_TK = mask(given["hidden_states"], falling_TK).to(weights_TK)
    mask_TK = torch.zeros_like(sorted_TK).scatter(1, order_TK, sorted_TK)
    kept_TK = weights_TK * mask_TK
    if renormalize:
        smallest = torch.finfo(kept_TK.dtype).tiny  # of a token that keeps nothing, 0 stays 0
        total_T1 = kept_TK.sum(1, keepdim=True).clamp(min=smallest)
        kept_TK = kept_TK * (weights_TK.sum(1, keepdim=True) / total_T1)
    changes = {"top_k_weights": kept_TK}
    if not kept_TK.requires_grad and not _is_eager(bank):
        changes["top_k_index"] = experts_TK.masked_fill(mask_TK == 0, bank.num_experts)
    return *changed_call(args, kwargs, changes), mask_TK


def skip_masked_slots(bank: Any, on: bool) -> bool:
    """Tells transformers' implementations whether some slots of a bank have index E; returns what was set.

    They know them from expert parallelism alone: without this flag, `grouped_mm` multiplies what happens to
    be in memory by the weight 0, and gives NaN where that is no number.
    """
    was: bool = getattr(bank, "_is_expert_parallel", False)
    if hasattr(bank, "_is_expert_parallel"):  # packed experts need no telling
        bank._is_expert_parallel = on
    return was


class _Placed(nn.Module):
    """A mask in its place; `skipped` is what `skip_masked_slots` found there."""

    def __init__(self, mask: PrefixMask, renormalize: bool, skipped: bool) -> None:
        super().__init__()
        self.mask, self.renormalize, self.skipped = mask, renormalize, skipped


def _apply_placed(
    bank: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    placed = bank._modules.get(_PLACE)
    if not isinstance(placed, _Placed):  # taken off
        return None
    args, kwargs, _ = mask_slots(bank, args, kwargs, placed.mask, renormalize=placed.renormalize)
    return args, kwargs


def _placed(model: nn.Module) -> list[tuple[str, nn.Module, _Placed]]:
    """(name of a bank, the bank, what is placed in it)."""
    found = []
    for name, module in model.named_modules():
        placed = module._modules.get(_PLACE)
        if isinstance(placed, _Placed):
            found.append((name, module, placed))
    return found


def _is_eager(bank: Any) -> bool:
    config = getattr(bank, "config", None)
    return config is not None and config._experts_implementation in (None, "eager")
