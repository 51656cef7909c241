"""Which experts to keep in each MoE block, and the model without the others."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.hf import BlockRecord, MoEBlock
from coterie.hf.blocks import Snapshot
from coterie.hf.calls import call_arguments, changed_call
from coterie.hf.edit import check_groups
from coterie.shrink.importance import IMPORTANCE, Importance, importance, kept_experts, mixed

OUTPUT_ERROR = "output-error"
METHODS = (*IMPORTANCE, "random", OUTPUT_ERROR)
"""What `choose` knows: every importance score, chance, and the search of `least_output_error`."""


def choose(
    block: MoEBlock, records: Sequence[BlockRecord], method: str | Importance, keep: int, *, seed: int = 0
) -> list[int]:
    """The experts that a block should keep, by their ids, rising.

    Args:
        block: whose experts are chosen.
        records: what it did with the text of each domain; one for a single domain. Scores of several are
            made to sum to 1 each, then averaged.
        method: one of METHODS, or a function of a record that scores its experts, [E].
        keep: how many, top_k ≤ keep ≤ E.
        seed: of "random"; blocks should differ in it.

    Raises ValueError for a method or a number that does not exist, or a record without tokens.

    Source of the mixture: Dong et al. 2025 (EASY-EP, arXiv 2504.06792), section 4.
    """
    check_keep([block], keep)
    if method == OUTPUT_ERROR:
        return least_output_error(block, torch.cat([record.inputs for record in records]), keep)
    scores = [importance([record], method, seed=seed) for record in records]
    return kept_experts(mixed(scores)[0], keep, groups=block.layout.groups)


def check_keep(blocks: Sequence[MoEBlock], keep: int) -> None:
    """Raises ValueError unless every block can live with `keep` experts."""
    for block in blocks:
        if not block.top_k <= keep <= block.num_experts:
            raise ValueError(
                f"keep={keep}, but {block.name} has {block.num_experts} experts and sends each token to "
                f"{block.top_k}; use {block.top_k} ≤ keep ≤ {block.num_experts}"
            )
        check_groups(block.layout, keep)


def prune(blocks: Sequence[MoEBlock], kept: Sequence[Sequence[int]]) -> None:
    """Deletes all experts but `kept` of each block, with their router rows; tokens go to those that stay.

    The choice is bound to the text that it was made for: other domains may use the experts that are gone.

    >>> from coterie.hf import find_moe_blocks
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
    >>> prune(find_moe_blocks(model), [[0, 2], [1, 3]])
    >>> [block.num_experts for block in find_moe_blocks(model)]
    [2, 2]
    """
    for block, ids in zip(blocks, kept, strict=True):
        block.keep(ids)


@contextmanager
def pruned(blocks: Sequence[MoEBlock], kept: Sequence[Sequence[int]]) -> Iterator[None]:
    """`prune` while the context is open: to try a choice, or several, on one model in memory."""
    with ExitStack() as trials:
        for block in blocks:
            trials.enter_context(block.trial())
        prune(blocks, kept)
        yield


@contextmanager
def restored(blocks: Sequence[MoEBlock], states: Sequence[Snapshot]) -> Iterator[None]:
    """The blocks as they were at their snapshots, while the context is open."""
    with ExitStack() as trials:
        for block, state in zip(blocks, states, strict=True):
            trials.enter_context(block.trial())
            block.restore(state)
        yield


@dataclass
class Silenced:
    """What `no_reroute` did to one block.

    Args:
        tokens: that the block was given.
        unserved: those among them whose experts were all removed; nothing is added to them.
    """

    tokens: int = 0
    unserved: int = 0


@contextmanager
def no_reroute(blocks: Sequence[MoEBlock], kept: Sequence[Sequence[int]]) -> Iterator[list[Silenced]]:
    """While the context is open, tokens are routed as ever, and experts outside `kept` give zero.

    Weights are not normalised again, and nothing becomes faster: this measures a choice, in memory only.

    Args:
        blocks: of one model.
        kept: ids for each block.

    Yields: one count per block, which grows with each pass.
    """
    counts = [Silenced() for _ in blocks]
    with ExitStack() as hooks:
        for block, ids, count in zip(blocks, kept, counts, strict=True):
            hook = block.bank.register_forward_pre_hook(_silence(block, ids, count), with_kwargs=True)
            hooks.callback(hook.remove)
        yield counts


def least_output_error(block: MoEBlock, inputs_TD: Tensor, keep: int, *, limit: int = 5000) -> list[int]:
    """The `keep` experts without which the block's output changes least, by trying all choices.

    Args:
        block: is run once for each choice.
        inputs_TD: what it read, as `recording(keep_inputs=…)` keeps it.
        keep: how many.
        limit: choices that may be tried at most.

    Returns: ids, rising, of the smallest Σ ‖output - output without the others‖².

    Raises ValueError if there are no inputs, more choices than `limit`, or the block cannot be run alone.

    Source: Lu et al. 2024 (arXiv 2402.14800), equation 2.
    """
    groups = block.layout.groups
    size = block.num_experts // groups
    choices = math.comb(size, keep // groups) ** groups
    if choices > limit:
        raise ValueError(
            f"{block.name}: there are {choices} ways to keep {keep} of {block.num_experts} experts, more "
            f"than can be tried ({limit}); use a method with a score, such as easy-ep"
        )
    if not len(inputs_TD):
        raise ValueError(f"{block.name}: no inputs were recorded; use recording(blocks, keep_inputs=1024)")
    if isinstance(block.layer, nn.ModuleList) or inputs_TD.shape[1] != block.config.hidden_size:
        raise ValueError(
            f"{block.name}: this family's router and experts cannot be run alone on what the experts read; "
            "use a method with a score, such as gating-norm"
        )
    inside = [range(g * size, (g + 1) * size) for g in range(groups)]
    per_group = [list(itertools.combinations(ids, keep // groups)) for ids in inside]
    full_TD, best, least = _output(block, inputs_TD), [], math.inf
    for picked in itertools.product(*per_group):
        ids = list(itertools.chain(*picked))
        with block.trial():
            block.keep(ids)
            error = float((_output(block, inputs_TD) - full_TD).square().sum())
        if error < least:
            best, least = ids, error
    return best


@torch.no_grad()
def _output(block: MoEBlock, inputs_TD: Tensor) -> Tensor:
    parameter = next(block.bank.parameters())
    output = block.module(inputs_TD.to(parameter).unsqueeze(0))
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found.float()


def _silence(block: MoEBlock, ids: Sequence[int], count: Silenced) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = call_arguments(args, kwargs)
        experts_TK = given["top_k_index"]
        serves_E = torch.zeros(block.num_experts + 1, dtype=torch.bool, device=experts_TK.device)
        serves_E[list(ids)] = True
        outside = (experts_TK < 0) | (experts_TK >= block.num_experts)
        serves_TK = serves_E[experts_TK.masked_fill(outside, block.num_experts).long()]
        count.tokens += len(experts_TK)
        count.unserved += int((~serves_TK).all(1).sum())
        weights_TK = given["top_k_weights"].masked_fill(~serves_TK, 0)
        return changed_call(args, kwargs, {"top_k_weights": weights_TK})

    return hook
