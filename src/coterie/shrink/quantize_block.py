"""Experts and router of one MoE block in few bits: to nearest, or by GPTQ or AWQ on what each reads."""

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
from coterie.shrink.quantize import awq, rtn
from coterie.shrink.routed import routed_tokens, router_inputs

Rounding = Literal["gptq", "awq", "rtn"]

SEARCH: dict[str, Any] = {"factors": torch.linspace(0.9, 1.1, 100).tolist(), "norm": 2.4}
"""MC's search for the scale of a group."""
CLIPPING: dict[str, Any] = {"factors": torch.linspace(1.0, 0.5, 11).tolist()}
"""MoEQuant's, for AWQ, which makes it anew for each of its 20 candidates."""


@torch.no_grad()
def quantize_block(
    block: MoEBlock,
    inputs_TD: Tensor,
    bits: Sequence[int],
    rounding: Rounding = "gptq",
    *,
    affinity: bool = False,
    group_size: int = 128,
    damping: float = 0.01,
    **search: Any,
) -> tuple[list[PackedWeight], list[PackedWeight]]:
    """Rounds every expert to its own bits; the block is left as it is.

    With GPTQ and AWQ the first matrices see the tokens that the router sends to the expert, and the last one
    what the rounded first ones make of them. Which tokens those are, and with what weights, is asked of the
    block as it is: whoever rounds its router, too, does that before (`quantize_router`).

    Args:
        block: of experts that can be packed.
        inputs_TD: what the block reads (`block_inputs`), of the model as far as it is quantised by then.
        bits: of each expert.
        rounding: "gptq", "awq", or "rtn", which looks at no token.
        affinity: count each token by its combine weight, as applied, rather than once: an error weighs as
            much as what it is multiplied by. Weighting leaves less of a small sample; see
            `coterie reproduce moequant`.
        group_size: as in `rtn`.
        damping: as in `gptq`.
        search: factors, norm (not of AWQ) and symmetric, as in `rtn`; MC's search of 100 factors if none are
            given, and MoEQuant's of 11 for AWQ.

    Returns for each expert its packed first matrices [2 or 1, F, D] and its last [D, F].

    Warns, naming block and expert, where no token reached an expert or a Hessian cannot be used: those
    matrices are rounded to nearest.

    Raises ValueError when the number of bits is not the number of experts.

    Source: Huang et al. 2024 (MC), section 3.2; damping and search from its code. The affinity is MoEQuant's
    (2025, arXiv 2505.03804), section 3.3.
    """
    if len(bits) != block.num_experts:
        raise ValueError(f"{block.name}: {len(bits)} bit widths for {block.num_experts} experts")
    options = {"group_size": group_size, **(search or (CLIPPING if rounding == "awq" else SEARCH))}
    calibrating = options | ({"damping": damping} if rounding == "gptq" else {})
    routed, w_in, w_out = routed_tokens(block, inputs_TD), [], []
    for e, width in enumerate(bits):
        first, last = expert_matrices(block, e)
        x_nD, weights_n = routed.of(e)
        if rounding == "rtn" or not len(x_nD):
            if rounding != "rtn":
                warnings.warn(
                    f"{block.name}, expert {e}: no calibration token reached it; it is rounded to nearest",
                    stacklevel=2,
                )
            w_in.append(rtn(first, width, **options))
            w_out.append(rtn(last, width, **options))
            continue
        counted_n = weights_n if affinity else None
        with _named(f"{block.name}, expert {e}"):
            w_in.append(_calibrated(rounding, first, x_nD, counted_n, width, calibrating))
            hidden_nF = expert_hidden(block, e, x_nD, w_in[-1].dequantize())
            w_out.append(_calibrated(rounding, last, hidden_nF, counted_n, width, calibrating))
    return w_in, w_out


@torch.no_grad()
def quantize_router(
    block: MoEBlock,
    inputs_TD: Tensor,
    bits: int,
    rounding: Rounding = "gptq",
    *,
    group_size: int = 128,
    damping: float = 0.01,
    **search: Any,
) -> PackedWeight:
    """Rounds the rows of a block's router, on all tokens, each counted once; the block is left as it is.

    To round a router saves next to nothing, so small it is; but then it computes what one in few bits does.
    Put the rows in place before the experts are rounded, so that those see the tokens which the rounded
    router sends them:

    rows = quantize_router(block, inputs_TD, 8)
    block.router.rows.copy_(rows.dequantize())
    packed = quantize_block(block, inputs_TD, widths, affinity=True)

    Args:
        block: of any family whose router ends in a linear map; biases and selection biases are not rounded.
        inputs_TD: as in `quantize_block`.
        bits: 2, 3, 4 or 8.
        rounding: as in `quantize_block`.
        group_size: as in `rtn`.
        damping: as in `gptq`.
        search: as in `quantize_block`.

    Returns the packed rows [E, D'] of the routed experts.

    Raises ValueError for 1 bit, as signs alone choose no expert, and if what the router reads cannot be seen.

    Source: MoEQuant (2025, arXiv 2505.03804), order of its code: attention, router, routing anew, experts.
    """
    if bits == 1:
        raise ValueError(f"{block.name}: signs alone choose no expert; round a router to 2, 3, 4 or 8 bits")
    options = {"group_size": group_size, **(search or (CLIPPING if rounding == "awq" else SEARCH))}
    rows_ED = block.router.rows.float().cpu()
    if rounding == "rtn":
        return rtn(rows_ED, bits, **options)
    calibrating = options | ({"damping": damping} if rounding == "gptq" else {})
    with _named(f"{block.name}, router"):
        return _calibrated(rounding, rows_ED, router_inputs(block, inputs_TD), None, bits, calibrating)


def _calibrated(
    rounding: Rounding,
    matrices: Tensor,
    x_nD: Tensor,
    weights_n: Tensor | None,
    bits: int,
    options: dict[str, Any],
) -> PackedWeight:
    """The matrices of one input, rounded on these tokens, each counted by its weight or once."""
    hessian = HessianMean(x_nD.shape[1])
    hessian.add(x_nD, weights_n)
    if rounding == "awq":
        return awq(matrices, x_nD.abs().mean(0), hessian.mean(), bits, **options)
    return gptq(matrices, hessian.mean(), bits, **options)


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Says of every warning inside where it came from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        warnings.warn(f"{place}: {warning.message}", warning.category, stacklevel=4)
