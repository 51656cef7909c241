"""The decisions of a model's MoE blocks as `Routing`, with the router's gradient.

output, routings = route(model, blocks, input_ids=ids)
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from coterie.hf import modules
from coterie.hf.blocks import MoEBlock
from coterie.hf.calls import call_arguments
from coterie.nn import Routing


def route(model: PreTrainedModel, blocks: Sequence[MoEBlock], **inputs: Any) -> tuple[Any, list[Routing]]:
    """One forward pass: what the model returns, and what each block decided.

    Args:
        model: which the blocks are of.
        blocks: those whose decisions are wanted, in order of depth.
        inputs: the model's, such as input_ids [B, S] and attention_mask [B, S]. Where the mask is 0, the
            routings are masked, too.

    Returns the model's output and one Routing per block, T = B · S. Experts and weights are those that the
    block applied. Logits are computed again from what the router read, in float32, and scores are their
    softmax, whatever gate the block has: for a sigmoid gate they are not what its weights came from.

    Raises ValueError if a block was not reached, or its router reads something of another width or length.

    >>> from coterie.hf import find_moe_blocks
    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
    >>> _, routings = route(model, find_moe_blocks(model), input_ids=torch.arange(10).view(2, 5))
    >>> [(r.experts.shape[0], r.num_experts, r.weights.requires_grad) for r in routings]
    [(10, 4, True), (10, 4, True)]
    """
    seen: list[dict[str, Tensor]] = [{} for _ in blocks]
    handles = [h for block, found in zip(blocks, seen, strict=True) for h in _hook(model, block, found)]
    try:
        output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    mask = inputs.get("attention_mask")
    mask_T = None if mask is None else mask.flatten().bool()
    return output, [_routing(model, b, found, mask_T) for b, found in zip(blocks, seen, strict=True)]


def router_parameter(model: PreTrainedModel, block: MoEBlock, role: str) -> Tensor | None:
    """What holds a block's "rows" or "bias", as the model trains it: not a view, and with a gradient."""
    name = block.layout.router.get(role)
    return None if name is None else modules.get_tensor(model, name)


def _hook(model: PreTrainedModel, block: MoEBlock, found: dict[str, Tensor]) -> list[Any]:
    owner: nn.Module = model.get_submodule(block.layout.router["rows"].rpartition(".")[0])

    def before_router(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found["read"] = args[0] if args else next(iter(kwargs.values()))

    return [
        owner.register_forward_pre_hook(before_router, with_kwargs=True),
        block.bank.register_forward_pre_hook(_before_experts(found), with_kwargs=True),
    ]


def _before_experts(found: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(call_arguments(args, kwargs))

    return hook


def _routing(
    model: PreTrainedModel, block: MoEBlock, found: dict[str, Tensor], mask_T: Tensor | None
) -> Routing:
    if not {"read", "top_k_index"} <= set(found):
        raise ValueError(f"{block.name}: no token came to its router and experts")
    rows, bias = (router_parameter(model, block, role) for role in ("rows", "bias"))
    assert rows is not None
    read, experts_TK, weights_TK = found["read"], found["top_k_index"], found["top_k_weights"]
    read_TD = read.reshape(-1, read.shape[-1])
    if read_TD.shape[1] != rows.shape[1] or len(read_TD) != len(experts_TK):
        raise ValueError(
            f"{block.name}: the router reads {tuple(read_TD.shape)} for {len(experts_TK)} tokens, "
            f"and its rows are {rows.shape[1]} wide; routers of this kind are not understood"
        )
    e = block.num_experts
    logits_TE = F.linear(read_TD.float(), rows[:e].float(), None if bias is None else bias[:e].float())
    used_TK = (experts_TK >= 0) & (experts_TK < e)
    if mask_T is not None:
        if len(mask_T) != len(used_TK):
            raise ValueError(f"{block.name} saw {len(used_TK)} tokens; the attention mask has {len(mask_T)}")
        used_TK = used_TK & mask_T.unsqueeze(1)
    return Routing(
        experts_TK.long().masked_fill(~used_TK, -1),
        weights_TK.float().masked_fill(~used_TK, 0),
        logits_TE.softmax(-1),
        logits_TE,
        e,
        mask_T,
    )
