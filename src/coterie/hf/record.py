"""What a model's MoE blocks did with some text: which experts each token used, with what weight and effect.

One forward pass fills the records; importance scores, merging and reports are then a few lines each.

Letters: T tokens, K slots per token, E experts, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.hf.blocks import MoEBlock
from coterie.hf.calls import call_arguments


@dataclass
class BlockRecord:
    """One MoE block's decisions over T tokens.

    Args:
        name: of the block in its model.
        num_experts: E.
        experts: [T, K] int64 expert of each slot, -1 where a slot is unused.
        weights: [T, K] float32 combine weight, as applied.
        norms: [T, K] float32 length of the expert's raw output, not multiplied by its weight.
        moved: [T] float32 1 - cos(h, h + Σ weight · output), at least 0: how far the routed experts turn the
            residual stream h. Shared experts do not count. Empty in the few families that have several
            residual streams, or whose router and experts lie in the layer itself.
        inputs: [N, D] what the block read, of the first N tokens; empty unless it was asked for.
    """

    name: str
    num_experts: int
    experts: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    weights: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    norms: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    moved: Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def sum_by_expert(self, values_TK: Tensor) -> Tensor:
        """[E] float64: sums over the slots that each expert filled.

        >>> record = BlockRecord("mlp", 3, experts=torch.tensor([[0, 2], [2, -1]]))
        >>> record.sum_by_expert(torch.ones(2, 2)).tolist()
        [1.0, 0.0, 2.0]
        """
        used_TK = self.experts >= 0
        sums_E = torch.zeros(self.num_experts, dtype=torch.float64)
        return sums_E.index_add_(0, self.experts[used_TK], values_TK.expand_as(used_TK)[used_TK].double())


@contextmanager
def recording(blocks: Sequence[MoEBlock], *, keep_inputs: int = 0) -> Iterator[list[BlockRecord]]:
    """Records every forward pass of these blocks while the context is open.

    The model computes what it always does; each recorded slot's expert runs once more, alone.

    Args:
        blocks: of one model.
        keep_inputs: keep the block's input for this many tokens.

    Yields: one record per block, which grows with each pass.

    >>> from coterie.hf import find_moe_blocks
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
    >>> with recording(find_moe_blocks(model)) as records:
    ...     _ = model(torch.arange(10).view(2, 5))
    >>> records[1].experts.shape, records[1].moved.shape
    (torch.Size([10, 2]), torch.Size([10]))
    """
    records = [BlockRecord(block.name, block.num_experts) for block in blocks]
    handles = []
    try:
        for block, record in zip(blocks, records, strict=True):
            handles += _hook(block, record, keep_inputs)
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _hook(block: MoEBlock, record: BlockRecord, keep_inputs: int) -> list[Any]:
    bank, layer = block.bank, block.layer
    passed: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_experts(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x_TD, experts_TK, weights_TK = _arguments(args, kwargs)
        norms, routed_TD = [], torch.zeros_like(x_TD, dtype=torch.float32)
        ones_T1 = torch.ones_like(weights_TK[:, :1])
        for k in range(experts_TK.shape[1]):  # forward itself: hooks would record this, too
            y_TD = module.forward(x_TD, experts_TK[:, k : k + 1], ones_T1).float()
            norms.append(y_TD.norm(dim=-1))
            routed_TD += weights_TK[:, k : k + 1].float() * y_TD
        passed["routed"] = routed_TD
        outside = (experts_TK < 0) | (experts_TK >= record.num_experts)
        _extend(record, "experts", experts_TK.masked_fill(outside, -1).long())
        _extend(record, "weights", weights_TK.float())
        _extend(record, "norms", torch.stack(norms, dim=1))
        missing = keep_inputs - len(record.inputs)
        if missing > 0:
            _extend(record, "inputs", x_TD[:missing])

    def after_block(module: Any, args: Any, output: Any) -> None:
        passed["block"] = _tensor(output).detach()

    @torch.no_grad()
    def after_layer(module: Any, args: Any, output: Any) -> None:
        routed_TD, block_TD = passed.pop("routed", None), passed.pop("block", None)
        if routed_TD is None or block_TD is None:  # no token came to this block
            return
        after_TD = _tensor(output).detach()
        if not after_TD.numel() == block_TD.numel() == routed_TD.numel():  # several residual streams
            return
        # a layer adds its block's output to the residual stream: what it was before is the difference
        before_TD = after_TD.reshape(routed_TD.shape).float() - block_TD.reshape(routed_TD.shape).float()
        moved_T = 1 - F.cosine_similarity(before_TD, before_TD + routed_TD, dim=-1)
        _extend(record, "moved", moved_T.clamp(min=0))

    return [
        bank.register_forward_pre_hook(before_experts, with_kwargs=True),
        block.module.register_forward_hook(after_block),
        layer.register_forward_hook(after_layer),
    ]


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, D], experts [T, K] and weights [T, K] of a call of transformers' experts interface."""
    given = call_arguments(args, kwargs)
    x, experts_TK, weights_TK = (given[name] for name in ("hidden_states", "top_k_index", "top_k_weights"))
    return x.reshape(-1, x.shape[-1]), experts_TK, weights_TK


def _tensor(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _extend(record: BlockRecord, name: str, new: Tensor) -> None:
    new, old = new.detach().cpu(), getattr(record, name)
    setattr(record, name, torch.cat([old, new]) if old.numel() else new)
