"""What a MoE block reads, and which of its tokens go to which expert.

Letters: T tokens, K slots per token, E experts, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.hf import MoEBlock
from coterie.hf.calls import call_arguments


class _Enough(Exception):
    """Raised by a hook: what was wanted has been seen, and the rest of the pass need not be computed."""


@torch.no_grad()
def block_inputs(model: PreTrainedModel, block: MoEBlock, batches_BS: Sequence[Tensor]) -> Tensor:
    """[T, D] what a block reads when the model reads some text, as the model is now.

    Every pass ends at the block, so one pass per block of a whole model costs half as much as full ones. On
    the CPU, in the model's dtype.

    Args:
        model: in evaluation mode.
        block: of the model.
        batches_BS: token ids [B, S] each, without padding.

    Raises ValueError, naming the block, if there is no text, or something read is not finite.
    """
    return caught_inputs(block, [partial(model, ids_BS.to(model.device)) for ids_BS in batches_BS])


@torch.no_grad()
def caught_inputs(block: MoEBlock, passes: Sequence[Callable[[], Any]]) -> Tensor:
    """[T, D] what a block reads in some passes, each of which ends there; see `block_inputs`.

    Args:
        block: read on its way by each pass.
        passes: calls of the model, or of the block's layer.
    """
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen.append(x.reshape(-1, x.shape[-1]).cpu())
        raise _Enough

    handle = block.module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for run in passes:
            try:
                run()
            except _Enough:
                continue
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"{block.name}: no calibration text was given; at least one batch is needed")
    inputs_TD = torch.cat(seen)
    bad = int((~inputs_TD.isfinite()).any(1).sum())
    if bad:
        raise ValueError(f"{block.name}: {bad} of {len(inputs_TD)} of its inputs are not finite")
    return inputs_TD


@dataclass(eq=False)
class RoutedTokens:
    """Tokens and the slots that a block's router gave them.

    Args:
        inputs_TD: the tokens, float32.
        experts_TK: expert of each slot, -1 where a slot is unused.
        weights_TK: combine weight of each slot, float32, as applied.
        num_experts: E.
    """

    inputs_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    num_experts: int

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens of one expert: ([n, D], their combine weights [n])."""
        here_TK = self.experts_TK == expert
        here_T = here_TK.any(1)
        return self.inputs_TD[here_T], (self.weights_TK * here_TK).sum(1)[here_T]

    def sums(self, values_TK: Tensor) -> Tensor:
        """[E] float64: sums over the slots that each expert filled."""
        used_TK = self.experts_TK >= 0
        sums_E = torch.zeros(self.num_experts, dtype=torch.float64)
        return sums_E.index_add_(0, self.experts_TK[used_TK], values_TK[used_TK].double())


@torch.no_grad()
def routed_tokens(block: MoEBlock, inputs_TD: Tensor) -> RoutedTokens:
    """Asks a block where it sends tokens, without computing experts.

    Args:
        block: its own code routes.
        inputs_TD: what it reads.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = call_arguments(args, kwargs)
        seen.append((given["top_k_index"].long().cpu(), given["top_k_weights"].float().cpu()))
        raise _Enough

    parameter = next(block.module.parameters())
    handle = block.bank.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        block.module(inputs_TD.to(parameter.device).unsqueeze(0))
    except _Enough:
        pass
    finally:
        handle.remove()
    ((experts_TK, weights_TK),) = seen
    outside_TK = (experts_TK < 0) | (experts_TK >= block.num_experts)
    return RoutedTokens(
        inputs_TD.float(), experts_TK.masked_fill(outside_TK, -1), weights_TK, block.num_experts
    )


@torch.no_grad()
def router_inputs(block: MoEBlock, inputs_TD: Tensor) -> Tensor:
    """[T, D'] float32: what the last linear map of a block's router reads when the block reads these.

    Most routers read the block's own input; some normalise or project it before.

    Args:
        block: its own code computes.
        inputs_TD: what the block reads.

    Raises ValueError, naming the block, if that map is not called as a module of its own, or reads something
    else than its rows are wide.
    """
    name = block.layout.router["rows"].removeprefix(f"{block.name}.").rpartition(".")[0]
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args or tuple(kwargs.values()))[0].float().cpu())
        raise _Enough

    handle = block.module.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        block.module(inputs_TD.to(next(block.module.parameters()).device).unsqueeze(0))
    except _Enough:
        pass
    finally:
        handle.remove()
    width = block.router.rows.shape[1]
    if not seen or seen[0].shape[-1] != width:
        found = f"reads {list(seen[0].shape)}" if seen else "is not called by itself"
        raise ValueError(f"{block.name}: its router's {name} {found}, where [tokens, {width}] is expected")
    return seen[0].reshape(-1, width)
