"""The experts of one MoE block in few bits: round to nearest, or GPTQ on the tokens that each expert gets."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from coterie.hf import MoEBlock
from coterie.kernels import PackedWeight
from coterie.shrink.gptq import HessianMean, gptq
from coterie.shrink.packed_blocks import expert_hidden, expert_matrices
from coterie.shrink.quantize import rtn
from coterie.shrink.routed import routed_tokens

Rounding = Literal["gptq", "rtn"]

SEARCH: dict[str, Any] = {"factors": torch.linspace(0.9, 1.1, 100).tolist(), "norm": 2.4}
"""MC's search for the scale of a group."""


@torch.no_grad()
def quantize_block(
    block: MoEBlock,
    inputs_TD: Tensor,
    bits: Sequence[int],
    rounding: Rounding = "gptq",
    *,
    group_size: int = 128,
    damping: float = 0.01,
    **search: Any,
) -> tuple[list[PackedWeight], list[PackedWeight]]:
    """Rounds every expert to its own bits; the block is left as it is.

    With GPTQ the first matrices see the tokens that the router sends to the expert, each counted once, and
    the last one what the rounded first ones make of them.

    Args:
        block: of experts that can be packed.
        inputs_TD: what the block reads (`block_inputs`), of the model as far as it is quantised by then.
        bits: of each expert.
        rounding: "gptq", or "rtn", which looks at no token.
        group_size: as in `rtn`.
        damping: as in `gptq`.
        search: factors and norm, as in `rtn`; MC's search of 100 factors if none are given.

    Returns for each expert its packed first matrices [2 or 1, F, D] and its last [D, F].

    Warns, naming block and expert, where no token reached an expert or a Hessian cannot be used: those
    matrices are rounded to nearest.

    Raises ValueError when the number of bits is not the number of experts.

    Source: Huang et al. 2024 (MC), section 3.2; damping and search from its code.
    """
    if len(bits) != block.num_experts:
        raise ValueError(f"{block.name}: {len(bits)} bit widths for {block.num_experts} experts")
    options = {"group_size": group_size, **(search or SEARCH)}
    routed, w_in, w_out = routed_tokens(block, inputs_TD), [], []
    for e, width in enumerate(bits):
        first, last = expert_matrices(block, e)
        x_nD, _ = routed.of(e)
        if rounding == "rtn" or not len(x_nD):
            if rounding == "gptq":
                warnings.warn(
                    f"{block.name}, expert {e}: no calibration token reached it; it is rounded to nearest",
                    stacklevel=2,
                )
            w_in.append(rtn(first, width, **options))
            w_out.append(rtn(last, width, **options))
            continue
        with _named(f"{block.name}, expert {e}"):
            w_in.append(gptq(first, _hessian(x_nD), width, damping=damping, **options))
            hidden_nF = expert_hidden(block, e, x_nD, w_in[-1].dequantize())
            w_out.append(gptq(last, _hessian(hidden_nF), width, damping=damping, **options))
    return w_in, w_out


def _hessian(x_nD: Tensor) -> Tensor:
    hessian = HessianMean(x_nD.shape[1])
    hessian.add(x_nD)
    return hessian.mean()


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Says of every warning inside where it came from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        warnings.warn(f"{place}: {warning.message}", warning.category, stacklevel=4)
