"""Packed low-bit experts on a CPU in one fused pass: csrc/low_bit.h, called through a plain C interface.

The same bits for a token in any batch, with any number of threads, as `coterie.kernels.native`.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.kernels.activations import ClampedSwiGLU
from coterie.kernels.dispatch import Dispatch
from coterie.kernels.native import activation_code, clamp_fields, computes
from coterie.kernels.native_library import DTYPES, Codes, Mlp, empty, library
from coterie.kernels.packed import PackedWeight


def codes_table(w_in: Sequence[PackedWeight], w_out: Sequence[PackedWeight]) -> ctypes.Array[Codes]:
    """CoterieCodes [E][3]. It points into the weights' tensors, which must outlive it."""
    table = (Codes * (3 * len(w_in)))()
    for e, (first, down) in enumerate(zip(w_in, w_out, strict=True)):
        matrices = [first[0], first[-1], down]
        for i, w in enumerate(matrices):
            if not all(t.is_contiguous() for t in w.tensors().values()):
                raise ValueError(f"expert {e}'s packed tensors are not contiguous")
            table[3 * e + i] = Codes(
                w.codes.data_ptr(),
                w.scales.data_ptr(),
                None if w.zeros is None else w.zeros.data_ptr(),
                None if w.input_scale is None else w.input_scale.data_ptr(),
                w.bits,
                w.group_size,
            )
    return table


def supported(
    x_TD: Tensor,
    weights_TK: Tensor,
    dispatch: Dispatch,
    biases: Sequence[Tensor],
    activation: str | ClampedSwiGLU,
) -> bool:
    """float32 and bfloat16 on a CPU, as `native.grouped_mlp`, without gradients."""
    tensors = (x_TD, weights_TK, *biases)
    return (
        computes(activation)
        and x_TD.dtype in DTYPES
        and weights_TK.dtype in DTYPES
        and all(t.dtype == x_TD.dtype for t in biases)
        and all(t.device.type == "cpu" and t.numel() > 0 for t in tensors)
        and dispatch.order_N.device.type == "cpu"
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def low_bit_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    dispatch: Dispatch,
    table: ctypes.Array[Codes],
    hidden: int,
    out: int,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str | ClampedSwiGLU,
    gated: bool,
) -> Tensor:
    """See `coterie.kernels.low_bit_mlp`, for what is `supported`."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    weights_TK = weights_TK.float().contiguous()
    order_N, ends_E = dispatch.order_N.contiguous(), dispatch.ends_E.contiguous()
    b_in = None if b_in is None else b_in.contiguous()
    b_out = None if b_out is None else b_out.contiguous()
    code, numbers = activation_code(activation)
    y_TO = empty((x_TD.shape[0], out), x_TD.dtype)
    mlp = Mlp(
        tokens=x_TD.shape[0],
        slots=weights_TK.shape[1],
        experts=len(table) // 3,
        dim=x_TD.shape[1],
        hidden=hidden,
        out=out,
        dtype=DTYPES[x_TD.dtype],
        activation=code,
        gated=gated,
        threads=torch.get_num_threads(),
        **clamp_fields(numbers),
        x=x_TD.data_ptr(),
        x_row=x_TD.stride(0),
        weights=weights_TK.data_ptr(),
        order=order_N.data_ptr(),
        ends=ends_E.data_ptr(),
        b_in=None if b_in is None else b_in.data_ptr(),
        b_out=None if b_out is None else b_out.data_ptr(),
        y=y_TO.data_ptr(),
    )
    if library().coterie_low_bit(mlp, table):
        raise MemoryError("the native kernel could not allocate its work space")
    return y_TO
