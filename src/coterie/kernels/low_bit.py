"""The seam between packed expert banks and backends: `low_bit_mlp`.

Letters: T tokens, K slots per token, N = T·K, E experts, D input width, F hidden width, O output width.
"""

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from coterie.kernels import native_low_bit
from coterie.kernels.activations import ClampedSwiGLU, check_activation
from coterie.kernels.dispatch import Dispatch, sort_by_expert
from coterie.kernels.grouped import available_backends, default_backend, grouped_mlp
from coterie.kernels.packed import PackedWeight


class PackedBank:
    """E experts' packed matrices, each expert with bits of its own.

    Args:
        w_in: for each expert [2, F, D] (gate, up), or [1, F, D] without a gate. Gate and up share their
            input scale.
        w_out: for each expert [O, F].

    Raises ValueError when there are no experts or their shapes differ.
    """

    def __init__(self, w_in: Sequence[PackedWeight], w_out: Sequence[PackedWeight]) -> None:
        self.w_in, self.w_out = list(w_in), list(w_out)
        shapes = {(first.shape, down.shape) for first, down in zip(w_in, w_out, strict=True)}
        if len(shapes) != 1:
            raise ValueError(f"the experts of a bank have one shape; found {sorted(shapes) or 'no experts'}")
        ((matrices, self.hidden, self.dim), (self.out, hidden)) = shapes.pop()
        if matrices not in (1, 2) or hidden != self.hidden:
            raise ValueError(
                f"w_in [{matrices}, {self.hidden}, {self.dim}] and w_out [{self.out}, {hidden}]; "
                f"use [1 or 2, F, D] and [O, F]"
            )
        if any(w.input_scale is not None and not _rows_equal(w.input_scale) for w in w_in):
            raise ValueError("gate and up have different input scales; quantise them with one")
        self.gated = matrices == 2

    def __len__(self) -> int:
        return len(self.w_in)

    @cached_property
    def table(self) -> ctypes.Array[Any]:
        """The native kernel's view of the bank, made once."""
        return native_low_bit.codes_table(self.w_in, self.w_out)


def low_bit_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    dispatch: Dispatch,
    bank: PackedBank,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    activation: str | ClampedSwiGLU = "silu",
    backend: str | None = None,
) -> Tensor:
    """`grouped_mlp` with packed experts: every token through its chosen experts, combined by weight.

    The native backend turns codes into numbers in registers, on the way into the products, for any number of
    tokens. The reference and torch backends dequantise one expert at a time, in the dtype of `x_TD`, and
    multiply through `grouped_mlp`; so does the native backend where its kernel does not apply (float64, tanh,
    another device, gradients).

    Args:
        x_TD: tokens [T, D].
        weights_TK: combine weights [T, K].
        dispatch: the slots sorted by expert (`Routing.dispatch`).
        bank: the experts.
        b_in: bias [E, F], or [E, 2F] when gated, or None; cast to the dtype of the tokens.
        b_out: bias [E, O], or None; likewise.
        activation: a name in `ACTIVATIONS`, or a `ClampedSwiGLU` of gate and up.
        backend: "reference", "torch" or "native"; None takes `default_backend()`.

    Returns [T, O] in the dtype of `x_TD` (of autocast inside an autocast region). A token without a used slot
    gets zeros. Gradients flow to `x_TD`, `weights_TK` and the biases.

    Raises ValueError for widths that do not fit, an unknown activation or backend.
    """
    check_activation(activation, bank.gated)
    if x_TD.dim() != 2 or x_TD.shape[1] != bank.dim:
        raise ValueError(f"tokens have shape {tuple(x_TD.shape)}; these experts take [T, {bank.dim}]")
    if weights_TK.shape != (x_TD.shape[0], dispatch.slots) or len(dispatch.ends_E) != len(bank):
        raise ValueError(
            f"weights {tuple(weights_TK.shape)} and a dispatch over {len(dispatch.ends_E)} experts; "
            f"these tokens take [{x_TD.shape[0]}, {dispatch.slots}] and {len(bank)} experts"
        )
    name = backend or default_backend()
    if name not in available_backends():
        raise ValueError(f"backend={name!r} is not available here; use {' or '.join(available_backends())}")
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        x_TD = x_TD.to(torch.get_autocast_dtype(device))
    b_in = None if b_in is None else b_in.to(x_TD.dtype)
    b_out = None if b_out is None else b_out.to(x_TD.dtype)
    biases = [b for b in (b_in, b_out) if b is not None]
    if name == "native" and native_low_bit.supported(x_TD, weights_TK, dispatch, biases, activation):
        return native_low_bit.low_bit_mlp(
            x_TD,
            weights_TK,
            dispatch,
            bank.table,
            bank.hidden,
            bank.out,
            b_in,
            b_out,
            activation,
            bank.gated,
        )
    with torch.autocast(device, enabled=False):
        return _dequantize_and_multiply(x_TD, weights_TK, dispatch, bank, b_in, b_out, activation, name)


def _dequantize_and_multiply(
    x_TD: Tensor,
    weights_TK: Tensor,
    dispatch: Dispatch,
    bank: PackedBank,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str | ClampedSwiGLU,
    backend: str,
) -> Tensor:
    """One expert after the other, so that no more than one is ever held in full."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    y_TO = x_TD.new_zeros(x_TD.shape[0], bank.out, dtype=wide)
    weights_N, start = weights_TK.reshape(-1), 0
    for e, end in enumerate(dispatch.ends_E.tolist()):
        slots_n = dispatch.order_N[start:end]
        start = end
        if len(slots_n) == 0:
            continue
        tokens_n = slots_n // dispatch.slots
        y_nO = grouped_mlp(
            x_TD[tokens_n],
            weights_N[slots_n].unsqueeze(1),
            sort_by_expert(torch.zeros_like(slots_n).unsqueeze(1), 1),
            bank.w_in[e].dequantize(wide).flatten(0, 1).unsqueeze(0).to(x_TD.dtype),
            bank.w_out[e].dequantize(wide).unsqueeze(0).to(x_TD.dtype),
            None if b_in is None else b_in[e : e + 1],
            None if b_out is None else b_out[e : e + 1],
            activation=activation,
            gated=bank.gated,
            backend=backend,
        )
        y_TO = y_TO.index_add(0, tokens_n, y_nO.to(wide))
    return y_TO.to(x_TD.dtype)


def _rows_equal(t: Tensor) -> bool:
    return torch.equal(t, t[:1].expand_as(t))
