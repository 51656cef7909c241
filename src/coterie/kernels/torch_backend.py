"""Grouped experts in torch alone: sort rows by expert, two grouped products, weighted sum back.

On CUDA the products are `torch.nn.functional.grouped_mm`; on a CPU one `mm` per expert into a shared
output is faster than `grouped_mm`'s fallback and takes every dtype. Moving rows is a permutation both
ways, so forward and backward gather and never scatter-add: deterministic on every device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.kernels.activations import ClampedSwiGLU, activate
from coterie.kernels.dispatch import Dispatch


def grouped_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    dispatch: Dispatch,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str | ClampedSwiGLU,
    gated: bool,
    interleaved: bool = False,
) -> Tensor:
    """See `coterie.kernels.grouped_mlp`."""
    inverse_N, tokens_N = dispatch.inverse_N, dispatch.tokens_N
    rows_ND: Tensor = _Gather.apply(x_TD, tokens_N, inverse_N, dispatch.slots)  # type: ignore[no-untyped-call]
    pre_N2F = grouped_linear(rows_ND, w_in, b_in, dispatch.ends_E)
    hidden_NF = activate(pre_N2F, activation, gated, interleaved)
    out_NO = grouped_linear(hidden_NF, w_out, b_out, dispatch.ends_E)
    y_TO: Tensor = _Combine.apply(  # type: ignore[no-untyped-call]
        out_NO, weights_TK, dispatch.order_N, inverse_N
    )
    return y_TO


def grouped_linear(x_ND: Tensor, w_EFD: Tensor, b_EF: Tensor | None, ends_E: Tensor) -> Tensor:
    """Rows of group e times w_EFD[e]ᵀ, plus b_EF[e]. Rows after the last group come out zero."""
    if x_ND.device.type == "cpu" or x_ND.dtype == torch.float64:
        y_NF: Tensor = _grouped_linear(x_ND, w_EFD, b_EF, ends_E)
        return y_NF
    y_NF = F.grouped_mm(x_ND, w_EFD.transpose(1, 2), offs=ends_E)
    rows_N = torch.arange(x_ND.shape[0], device=ends_E.device, dtype=ends_E.dtype)
    expert_N = torch.searchsorted(ends_E, rows_N, right=True)
    if b_EF is not None:
        y_NF = y_NF + F.pad(b_EF, (0, 0, 0, 1)).index_select(0, expert_N)
    return y_NF.masked_fill((expert_N == w_EFD.shape[0]).unsqueeze(1), 0)


class _Gather(torch.autograd.Function):
    """x_TD[tokens_N]; its backward sums each token's K rows after gathering them back."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tokens_N: Tensor, inverse_N: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.shape, ctx.slots = x_TD.shape, slots
        return x_TD.index_select(0, tokens_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_N,) = ctx.saved_tensors
        tokens, dim = ctx.shape
        d_rows = grads[0].index_select(0, inverse_N)
        return d_rows.view(tokens, ctx.slots, dim).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """y_TO = Σ_k weights_TK · rows of token t, slot k."""

    @staticmethod
    def forward(ctx: Any, rows_NO: Tensor, weights_TK: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NO, weights_TK, order_N, inverse_N)
        rows_TKO = rows_NO.index_select(0, inverse_N).view(*weights_TK.shape, rows_NO.shape[1])
        # float32: a sum of K bfloat16 products would round K times
        dtype = torch.promote_types(rows_NO.dtype, torch.float32)
        y_TO = torch.bmm(weights_TK.to(dtype).unsqueeze(1), rows_TKO.to(dtype)).squeeze(1)
        return y_TO.to(rows_NO.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_NO, weights_TK, order_N, inverse_N = ctx.saved_tensors
        slots = weights_TK.shape[1]
        dy_NO = grads[0].index_select(0, order_N // slots)
        d_rows = dy_NO * weights_TK.reshape(-1)[order_N].to(dy_NO.dtype).unsqueeze(1)
        d_weights_N = (dy_NO.to(weights_TK.dtype) * rows_NO.to(weights_TK.dtype)).sum(1)
        d_weights_TK = d_weights_N.index_select(0, inverse_N).view_as(weights_TK)
        return d_rows, d_weights_TK, None, None


@torch.library.custom_op("coterie::grouped_linear", mutates_args=())
def _grouped_linear(x_ND: Tensor, w_EFD: Tensor, b_EF: Tensor | None, ends_E: Tensor) -> Tensor:
    y_NF = x_ND.new_empty(x_ND.shape[0], w_EFD.shape[1])
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        if end > start:
            if b_EF is None:
                torch.mm(x_ND[start:end], w_EFD[e].t(), out=y_NF[start:end])
            else:
                torch.addmm(b_EF[e], x_ND[start:end], w_EFD[e].t(), out=y_NF[start:end])
        start = end
    y_NF[start:].zero_()
    return y_NF


@_grouped_linear.register_fake
def _(x_ND: Tensor, w_EFD: Tensor, b_EF: Tensor | None, ends_E: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], w_EFD.shape[1])


@torch.library.custom_op("coterie::grouped_outer", mutates_args=())
def _grouped_outer(dy_NF: Tensor, x_ND: Tensor, ends_E: Tensor) -> Tensor:
    """dw_EFD[e] = dy of group eᵀ times x of group e."""
    dw_EFD = x_ND.new_empty(len(ends_E), dy_NF.shape[1], x_ND.shape[1])
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        torch.mm(dy_NF[start:end].t(), x_ND[start:end], out=dw_EFD[e])
        start = end
    return dw_EFD


@_grouped_outer.register_fake
def _(dy_NF: Tensor, x_ND: Tensor, ends_E: Tensor) -> Tensor:
    return x_ND.new_empty(len(ends_E), dy_NF.shape[1], x_ND.shape[1])


@torch.library.custom_op("coterie::grouped_sum", mutates_args=())
def _grouped_sum(dy_NF: Tensor, ends_E: Tensor) -> Tensor:
    db_EF = dy_NF.new_empty(len(ends_E), dy_NF.shape[1])
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        torch.sum(dy_NF[start:end], 0, out=db_EF[e])
        start = end
    return db_EF


@_grouped_sum.register_fake
def _(dy_NF: Tensor, ends_E: Tensor) -> Tensor:
    return dy_NF.new_empty(len(ends_E), dy_NF.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_ND, w_EFD, b_EF, ends_E = inputs
    ctx.save_for_backward(x_ND, w_EFD, ends_E)
    ctx.has_bias = b_EF is not None


def _backward(ctx: Any, dy_NF: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x_ND, w_EFD, ends_E = ctx.saved_tensors
    dy_NF = dy_NF.contiguous()
    need_x, need_w, need_b, _ = ctx.needs_input_grad
    dx = _grouped_linear(dy_NF, w_EFD.transpose(1, 2), None, ends_E) if need_x else None
    dw = _grouped_outer(dy_NF, x_ND, ends_E) if need_w else None
    db = _grouped_sum(dy_NF, ends_E) if ctx.has_bias and need_b else None
    return dx, dw, db, None


_grouped_linear.register_autograd(_backward, setup_context=_save_for_backward)
