"""Packed experts inside a transformers model: `pack_block`, `placed`, and what one expert computes.

Letters: T tokens, K slots per token, E experts, D width, F hidden width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.hf import MoEBlock
from coterie.hf.experts import fused_activation
from coterie.hf.packed import PackedExperts, set_bank
from coterie.hf.top_any import masks_of
from coterie.kernels import ClampedSwiGLU, PackedWeight
from coterie.kernels.activations import activate
from coterie.kernels.packed import COLUMNS, ROWS, check_group_size
from coterie.nn import QuantizedExperts


def pack_block(
    model: PreTrainedModel, block: MoEBlock, w_in: list[PackedWeight], w_out: list[PackedWeight]
) -> PackedExperts:
    """Puts packed experts in the place of a block's, whose memory is then free.

    Args:
        model: which the block is of.
        block: can no longer be edited afterwards.
        w_in: for each expert [2, F, D] (gate, up), or [1, F, D] without a gate.
        w_out: for each expert [D, F].
    """
    return place_bank(model, block, packed_bank(block, w_in, w_out))


def packed_bank(block: MoEBlock, w_in: list[PackedWeight], w_out: list[PackedWeight]) -> QuantizedExperts:
    """A bank with a block's biases and activation and these packed matrices; arguments as of `pack_block`."""
    activation, experts = check_packable(block), block.experts
    b_in = experts.up_bias
    if experts.gate_bias is not None and b_in is not None:
        b_in = torch.cat((experts.gate_bias, b_in), 1)
    return QuantizedExperts(w_in, w_out, b_in=b_in, b_out=experts.down_bias, activation=activation)


def place_bank(model: PreTrainedModel, block: MoEBlock, bank: QuantizedExperts) -> PackedExperts:
    """Puts a packed bank in the place of a block's experts; ValueError if these have a mask."""
    if masks_of(block.bank):
        raise ValueError(f"{block.name}: its experts per token are masked; pack them, then train masks anew")
    packed = PackedExperts(bank).to(block.experts.down.device)
    for place in (block, *block.also):
        set_bank(model, bank_name(place), packed)
    return packed


@contextmanager
def placed(model: nn.Module, banks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts banks in the places of those names while the context is open; then the present ones are back."""
    present = {name: model.get_submodule(name) for name in banks}
    for name, bank in banks.items():
        set_bank(model, name, bank)
    try:
        yield
    finally:
        for name, bank in present.items():
            set_bank(model, name, bank)


def packed_nbytes(block: MoEBlock, bits: Sequence[int], group_size: int, *, scaled: bool = False) -> int:
    """Bytes that a block's experts will take when packed, asymmetric groups and padding included.

    Args:
        block: of experts that can be packed.
        bits: of each expert.
        group_size: columns that share a scale.
        scaled: every column of every matrix has an input scale, as AWQ's have.
    """
    tensors, total = block.experts, 0
    matrices = [m for m in (tensors.gate, tensors.up, tensors.down) if m is not None]
    for _, rows, columns in [tuple(m.shape) for m in matrices]:
        blocks, units = -(-rows // ROWS), -(-columns // COLUMNS)
        groups = -(-columns // check_group_size(group_size, columns))
        for width in bits:
            per_group = 2 if width == 1 else 3  # a bfloat16 scale; one bit has no int8 zero point
            total += ROWS * blocks * (4 * units * width + groups * per_group) + scaled * 4 * columns
    biases = [b for b in (tensors.gate_bias, tensors.up_bias, tensors.down_bias) if b is not None]
    return total + sum(b.nbytes for b in biases)


def bank_name(block: MoEBlock) -> str:
    """Name of a block's bank of experts in its model."""
    return block.layout.experts["down"].rpartition(".")[0]


def check_packable(block: MoEBlock) -> str | ClampedSwiGLU:
    """The activation of a block's experts; ValueError if the kernels do not compute what they compute."""
    activation = fused_activation(block.bank)
    if activation is None:
        raise ValueError(
            f"{block.name}: experts of {type(block.bank).__name__} are neither act(gate · x) * (up · x) "
            "with a known activation nor a clamped SwiGLU; they cannot be packed"
        )
    return activation


def expert_matrices(block: MoEBlock, expert: int) -> tuple[Tensor, Tensor]:
    """One expert's [2, F, D] (gate, up), or [1, F, D] without a gate, and [D, F]; float32, on the CPU."""
    bank: Any = block.experts
    first = [bank.up[expert]] if bank.gate is None else [bank.gate[expert], bank.up[expert]]
    return torch.stack(first).float().cpu(), bank.down[expert].float().cpu()


@torch.no_grad()
def expert_hidden(block: MoEBlock, expert: int, x_nD: Tensor, w_in: Tensor) -> Tensor:
    """[n, F] act(gate · x) * (up · x) of an expert with this [2 or 1, F, D] in place of its own, float32."""
    bank: Any = block.experts
    products = [x_nD @ w.T for w in w_in]
    biases = [b[expert].float().cpu() for b in (bank.gate_bias, bank.up_bias) if b is not None]
    if biases:
        products = [p + b for p, b in zip(products, biases, strict=True)]
    return activate(torch.cat(products, -1), check_packable(block), gated=len(products) == 2)


@torch.no_grad()
def expert_output(block: MoEBlock, expert: int, x_nD: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """[n, D] what an expert would give with these matrices in place of its own, float32.

    Args:
        block: whose activation and biases are used.
        expert: its id.
        x_nD: tokens, float32.
        w_in: as of `expert_matrices`.
        w_out: likewise.
    """
    y_nD = expert_hidden(block, expert, x_nD, w_in) @ w_out.T
    bias: Any = block.experts.down_bias
    return y_nD if bias is None else y_nD + bias[expert].float().cpu()
