"""Grouped experts on a CPU in one fused pass: csrc/, called through a plain C interface.

Letters: T tokens, K slots per token, N = T·K, E experts, D input width, F hidden width, O output width.

Each output element is summed in one order, whatever the other tokens, the thread count or the schedule, so
the same token through the same experts gives the same bits in any batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from coterie.kernels import prepack, reference, torch_backend
from coterie.kernels.activations import ClampedSwiGLU
from coterie.kernels.dispatch import Dispatch
from coterie.kernels.native_library import (
    DTYPES,
    INSTRUCTION_SETS,
    Bank,
    Mlp,
    empty,
    instruction_set,
    library,
    machine_floor,
    profile,
    release_memory,
    sort_by_expert,
    why_unavailable,
)

__all__ = [
    "ACTIVATIONS",
    "INSTRUCTION_SETS",
    "grouped_mlp",
    "instruction_set",
    "machine_floor",
    "profile",
    "release_memory",
    "sort_by_expert",
    "why_unavailable",
]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid")  # in the order of activation.h


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
    """See `coterie.kernels.grouped_mlp`.

    float32 and bfloat16 (summed in float32) on a CPU, with the activations silu, gelu, gelu_tanh, relu,
    relu2 and sigmoid, and clamped SwiGLUs. Anything else, such as float64, mixed dtypes, tanh, or gradients
    of interleaved weights, is computed by the torch backend, and a second derivative by the reference
    backend: the same function, more slowly.
    """
    parameters = [t for t in (w_in, w_out, b_in, b_out) if t is not None]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, weights_TK, *parameters))
    lacking = interleaved and needs_grad
    if lacking or not _supported(x_TD, weights_TK, dispatch, parameters, activation):
        return torch_backend.grouped_mlp(
            x_TD, weights_TK, dispatch, w_in, w_out, b_in, b_out, activation, gated, interleaved
        )
    if interleaved and b_in is not None:
        b_in = torch.cat((b_in[:, ::2], b_in[:, 1::2]), 1)
    # The dispatcher costs as much as one token's experts; without autograd and tracing, go around it.
    direct = not needs_grad and not torch.compiler.is_compiling() and _plain(x_TD, w_in, w_out)
    mlp = _forward if direct else _mlp
    code, numbers = activation_code(activation)
    y_TO: Tensor = mlp(
        x_TD,
        weights_TK,
        dispatch.order_N,
        dispatch.ends_E,
        w_in,
        w_out,
        b_in,
        b_out,
        code,
        numbers,
        gated,
        interleaved,
        needs_grad,
    )[0]
    return y_TO


def computes(activation: str | ClampedSwiGLU) -> bool:
    """Whether the kernel knows an activation."""
    return isinstance(activation, ClampedSwiGLU) or activation in ACTIVATIONS


def clamp_fields(numbers: list[float]) -> dict[str, float]:
    """The fields of `Mlp` for the numbers of `activation_code`."""
    return dict(zip(("limit", "alpha", "shift"), numbers, strict=True)) if numbers else {}


def activation_code(activation: str | ClampedSwiGLU) -> tuple[int, list[float]]:
    """The kernel's number of an activation, and the numbers limit, alpha and shift of a clamped gate."""
    if isinstance(activation, ClampedSwiGLU):
        return len(ACTIVATIONS), [activation.limit, activation.alpha, activation.shift]
    return ACTIVATIONS.index(activation), []


def _supported(
    x_TD: Tensor,
    weights_TK: Tensor,
    dispatch: Dispatch,
    parameters: list[Tensor],
    activation: str | ClampedSwiGLU,
) -> bool:
    return (
        computes(activation)
        and x_TD.dtype in DTYPES
        and weights_TK.dtype in DTYPES
        and all(t.dtype == x_TD.dtype and t.device.type == "cpu" for t in parameters)
        and x_TD.device.type == weights_TK.device.type == dispatch.order_N.device.type == "cpu"
        and all(size > 0 for t in (x_TD, weights_TK, *parameters) for size in t.shape)
    )


def _plain(*tensors: Tensor) -> bool:
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _matrices(w: Tensor) -> Tensor:
    return w if 1 in w.stride()[1:] else w.clone(memory_format=torch.contiguous_format)


def _bank(w: Tensor) -> Bank:
    return Bank(w.data_ptr(), *w.stride())


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _problem(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    ends_E: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: int,
    numbers: list[float],
    gated: bool,
    interleaved: bool = False,
) -> tuple[Mlp, list[Tensor | None]]:
    """The C struct without its outputs, and the tensors it points into."""
    x_TD, w_in, w_out = _rows(x_TD), _matrices(w_in), _matrices(w_out)
    weights_TK = weights_TK.float().contiguous()
    order_N, ends_E = order_N.contiguous(), ends_E.contiguous()
    b_in = None if b_in is None else b_in.contiguous()
    b_out = None if b_out is None else b_out.contiguous()
    mlp = Mlp(
        tokens=x_TD.shape[0],
        slots=weights_TK.shape[1],
        experts=w_in.shape[0],
        dim=x_TD.shape[1],
        hidden=w_out.shape[2],
        out=w_out.shape[1],
        dtype=DTYPES[x_TD.dtype],
        activation=activation,
        gated=gated,
        interleaved=interleaved,
        threads=torch.get_num_threads(),
        **clamp_fields(numbers),
        x=x_TD.data_ptr(),
        x_row=x_TD.stride(0),
        weights=weights_TK.data_ptr(),
        order=order_N.data_ptr(),
        ends=ends_E.data_ptr(),
        w_in=_bank(w_in),
        w_out=_bank(w_out),
        b_in=_pointer(b_in),
        b_out=_pointer(b_out),
    )
    return mlp, [x_TD, weights_TK, order_N, ends_E, w_in, w_out, b_in, b_out]


def _check(code: int) -> None:
    if code:
        raise MemoryError("the native kernel could not allocate its work space")


def _forward(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    ends_E: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: int,
    numbers: list[float],
    gated: bool,
    interleaved: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y_TO, and the pre-activations in expert order [N, F or 2F] (empty unless `save`)."""
    mlp, kept = _problem(
        x_TD, weights_TK, order_N, ends_E, w_in, w_out, b_in, b_out, activation, numbers, gated, interleaved
    )
    y_TO = empty((x_TD.shape[0], w_out.shape[1]), x_TD.dtype)
    pre_NF = empty((order_N.shape[0] if save else 0, w_in.shape[1]), x_TD.dtype)
    mlp.y, mlp.pre = y_TO.data_ptr(), pre_NF.data_ptr() if save else None
    if (copies := prepack.active()) and not save:
        for bank, w, matrices in ((mlp.w_in, w_in, 2 if gated else 1), (mlp.w_out, w_out, 1)):
            kept.append(copies.find(w, matrices, interleaved and matrices == 2))
            bank.prepacked = _pointer(kept[-1])
    _check(library().coterie_forward(mlp))
    del kept
    return y_TO, pre_NF


_mlp = torch.library.custom_op("coterie::native_mlp", _forward, mutates_args=(), device_types="cpu")


@_mlp.register_fake
def _(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    ends_E: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    save = rest[-1]
    y_TO = x_TD.new_empty(x_TD.shape[0], w_out.shape[1])
    return y_TO, x_TD.new_empty(order_N.shape[0] if save else 0, w_in.shape[1])


@torch.library.custom_op("coterie::native_mlp_backward", mutates_args=(), device_types="cpu")
def _mlp_backward(
    dy_TO: Tensor,
    pre_NF: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    ends_E: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: int,
    numbers: list[float],
    gated: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of x, weights, w_in, w_out, b_in, b_out; an empty tensor for one not wanted."""
    mlp, kept = _problem(
        x_TD, weights_TK, order_N, ends_E, w_in, w_out, b_in, b_out, activation, numbers, gated
    )
    dy_TO = _rows(dy_TO)
    grads = _new_gradients(empty, (x_TD, weights_TK, w_in, w_out, b_in, b_out), wanted)
    mlp.dy, mlp.dy_row, mlp.pre = dy_TO.data_ptr(), dy_TO.stride(0), pre_NF.data_ptr()
    names = ("dx", "dweights", "dw_in", "dw_out", "db_in", "db_out")
    for name, grad, want in zip(names, grads, wanted, strict=True):
        setattr(mlp, name, grad.data_ptr() if want else None)
    _check(library().coterie_backward(mlp))
    del kept
    grads[1] = grads[1].to(weights_TK.dtype)
    return grads


def _new_gradients(
    empty: Callable[[tuple[int, ...], torch.dtype], Tensor],
    inputs: Sequence[Tensor | None],
    wanted: list[bool],
) -> list[Tensor]:
    """For x, weights, w_in, w_out, b_in, b_out; that of the combine weights is summed in float32."""
    x_TD = inputs[0]
    assert x_TD is not None
    dtypes = (x_TD.dtype, torch.float32, *[x_TD.dtype] * 4)
    return [
        empty(t.shape if want and t is not None else (0,), dtype)
        for t, want, dtype in zip(inputs, wanted, dtypes, strict=True)
    ]


@_mlp_backward.register_fake
def _(dy_TO: Tensor, pre_NF: Tensor, x_TD: Tensor, weights_TK: Tensor, *rest: Any) -> list[Tensor]:
    _, _, *matrices, _, _, _, wanted = rest
    grads = _new_gradients(
        lambda shape, dtype: x_TD.new_empty(shape, dtype=dtype), (x_TD, weights_TK, *matrices), wanted
    )
    grads[1] = grads[1].to(weights_TK.dtype)
    return grads


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.numbers, ctx.gated, _, _ = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, dy_TO: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    pre_NF, *tensors = ctx.saved_tensors
    positions = (0, 1, 4, 5, 6, 7)  # of the differentiable ones among the inputs
    wanted = [ctx.needs_input_grad[i] for i in positions]
    if torch.is_grad_enabled():  # create_graph=True: the gradients must be differentiable themselves
        grads = _differentiable_gradients(ctx, dy_TO, tensors, wanted)
    else:
        grads = _mlp_backward(dy_TO, pre_NF, *tensors, ctx.activation, ctx.numbers, ctx.gated, wanted)
    result: list[Tensor | None] = [None] * 13
    for i, grad, want in zip(positions, grads, wanted, strict=True):
        result[i] = grad if want else None
    return tuple(result)


def _differentiable_gradients(
    ctx: Any, dy_TO: Tensor, tensors: list[Any], wanted: list[bool]
) -> list[Tensor]:
    x_TD, weights_TK, order_N, ends_E, w_in, w_out, b_in, b_out = tensors
    y_TO = reference.grouped_mlp(
        x_TD,
        weights_TK,
        Dispatch(order_N, ends_E, weights_TK.shape[1]),
        w_in,
        w_out,
        b_in,
        b_out,
        ClampedSwiGLU(*ctx.numbers) if ctx.numbers else ACTIVATIONS[ctx.activation],
        ctx.gated,
    )
    inputs = [t for t, want in zip((x_TD, weights_TK, w_in, w_out, b_in, b_out), wanted, strict=True) if want]
    grads = iter(torch.autograd.grad(y_TO, inputs, dy_TO, create_graph=True))
    return [next(grads) if want else dy_TO for want in wanted]


_mlp.register_autograd(_backward, setup_context=_save_for_backward)
