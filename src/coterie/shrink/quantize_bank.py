"""A bank of experts in few bits, without calibration: `quantize_bank`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from coterie.kernels import PackedWeight
from coterie.nn import MLPExperts, QuantizedExperts, SwiGLUExperts
from coterie.shrink.quantize import rtn


def quantize_bank(
    bank: SwiGLUExperts | MLPExperts,
    bits: int | Sequence[int],
    quantize: Callable[..., PackedWeight] = rtn,
    **options: Any,
) -> QuantizedExperts:
    """Each expert's matrices through `quantize(matrices, bits, **options)`.

    Args:
        bank: what to quantise; it is left as it is.
        bits: for all experts, or one number for each.
        quantize: takes [2, F, D] (gate, up), [1, F, D] or [D_out, F], and bits.
        options: for `quantize`, such as group_size.

    Raises ValueError when the number of bits is not the number of experts.

    >>> quantize_bank(SwiGLUExperts(num_experts=4, dim=32, hidden=64), bits=[1, 2, 3, 4]).bits
    [1, 2, 3, 4]
    """
    widths = [bits] * bank.num_experts if isinstance(bits, int) else list(bits)
    if len(widths) != bank.num_experts:
        raise ValueError(
            f"{len(widths)} bit widths for {bank.num_experts} experts; give one each, or one for all"
        )
    if isinstance(bank, SwiGLUExperts):
        first, count, b_in = bank.gate_up_proj.detach(), 2, bank.gate_up_bias
    else:
        first, count, b_in = bank.up_proj.detach(), 1, bank.up_bias
    matrices = first.view(len(first), count, -1, bank.dim)
    packed = partial(quantize, **options)
    return QuantizedExperts(
        [packed(w, b) for w, b in zip(matrices, widths, strict=True)],
        [packed(w, b) for w, b in zip(bank.down_proj.detach(), widths, strict=True)],
        b_in=b_in,
        b_out=bank.down_bias,
        activation=bank.activation,
    )
