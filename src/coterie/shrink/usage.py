"""How evenly a text uses the experts of a model.

Letters: R rows of a batch, E experts of a block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.hf import MoEBlock, find_moe_blocks
from coterie.hf.calls import call_arguments


def balance_sigma(usage: Sequence[Tensor]) -> Tensor:
    """How unevenly experts are used: the standard deviation of their shares, the mean over blocks.

    Args:
        usage: of each block [..., E] shares, which sum to 1.

    Returns [...]: 0 where all are used alike.

    Source: MoEQuant (2025), section 3.2, with 1/(E - 1) inside the root.

    >>> balance_sigma([torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.25] * 4)]).item()
    0.14433756470680237
    """
    return torch.stack([shares.std(-1) for shares in usage]).mean(0)


@torch.no_grad()
def expert_usage(model: PreTrainedModel, batches_BS: Sequence[Tensor]) -> list[Tensor]:
    """Of each MoE block [E]: the share of its assignments that each expert gets when the model reads text.

    Args:
        model: in evaluation mode.
        batches_BS: token ids [B, S] each, without padding.

    Raises ValueError if there is no text.
    """
    if not batches_BS:
        raise ValueError("there is no text to count experts on; give at least one batch")
    blocks = find_moe_blocks(model)
    totals = [torch.zeros(block.num_experts) for block in blocks]
    with counting(blocks) as counts:
        for ids_BS in batches_BS:
            model(ids_BS.to(model.device))
            totals = [total + found.sum(0) for total, found in zip(totals, counts(1), strict=True)]
    return [to_shares(total) for total in totals]


@contextmanager
def counting(blocks: Sequence[MoEBlock]) -> Iterator[Callable[[int], list[Tensor]]]:
    """While the context is open, yields a function of R that gives, of each block, [R, E] the slots by
    expert of the last pass's R rows."""
    seen: list[Tensor] = [torch.empty(0)] * len(blocks)

    def hook(number: int) -> Any:
        def before_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[number] = call_arguments(args, kwargs)["top_k_index"].detach().long().cpu()

        return before_experts

    def counts(rows: int) -> list[Tensor]:
        found = []
        for block, experts_TK in zip(blocks, seen, strict=True):
            outside_TK = (experts_TK < 0) | (experts_TK >= block.num_experts)
            experts_RN = experts_TK.masked_fill(outside_TK, block.num_experts).reshape(rows, -1)
            zeros = torch.zeros(rows, block.num_experts + 1)
            found.append(zeros.scatter_add_(1, experts_RN, torch.ones_like(experts_RN, dtype=zeros.dtype)))
        return [count[:, :-1] for count in found]

    with ExitStack() as hooks:
        for number, block in enumerate(blocks):
            handle = block.bank.register_forward_pre_hook(hook(number), with_kwargs=True)
            hooks.callback(handle.remove)
        yield counts


def to_shares(counts: Tensor) -> Tensor:
    """[..., E] shares of counts; zeros where nothing was counted."""
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)
