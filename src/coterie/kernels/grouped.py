"""The seam between expert banks and backends: `grouped_mlp`.

Letters: T tokens, K slots per token, N = T·K, E experts, D input width, F hidden width, O output width.
"""

import os
from typing import Protocol

import torch
from torch import Tensor

from coterie.kernels import native, reference, torch_backend
from coterie.kernels.activations import ClampedSwiGLU, check_activation
from coterie.kernels.dispatch import Dispatch


class Backend(Protocol):
    """What a backend offers: the same computation, at its own speed."""

    def __call__(
        self,
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
    ) -> Tensor: ...


_BACKENDS: dict[str, Backend] = {"reference": reference.grouped_mlp, "torch": torch_backend.grouped_mlp}
if native.why_unavailable() is None:
    _BACKENDS["native"] = native.grouped_mlp


def available_backends() -> list[str]:
    """Backends that work on this machine, slowest first."""
    return list(_BACKENDS)


def default_backend() -> str:
    """The backend named by COTERIE_KERNEL, else the fastest that works here."""
    name = os.environ.get("COTERIE_KERNEL", "")
    if not name:
        return available_backends()[-1]
    if name not in available_backends():
        raise ValueError(f"COTERIE_KERNEL={name!r} is not available here; use {_choices()}")
    return name


def grouped_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    dispatch: Dispatch,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    activation: str | ClampedSwiGLU = "silu",
    gated: bool = True,
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Every token through its chosen experts' two-layer MLPs, combined by weight.

    Args:
        x_TD: tokens [T, D].
        weights_TK: combine weights [T, K]; any sign, any sum. Read only where a slot is used.
        dispatch: the slots sorted by expert (`Routing.dispatch`).
        w_in: [E, F, D], or [E, 2F, D] when gated: F gate rows, then F up rows.
        w_out: [E, O, D_hidden] with D_hidden = F.
        b_in: bias [E, F], or [E, 2F] when gated, or None.
        b_out: bias [E, O], or None.
        activation: a name in `ACTIVATIONS`, or a `ClampedSwiGLU` of gate and up.
        gated: hidden = act(gate) · up instead of act(up).
        interleaved: gate and up rows of `w_in` (and of its bias) take turns.
        backend: "reference", "torch" or "native"; None takes `default_backend()`.

    Returns [T, O] in the dtype of `x_TD` (of autocast inside an autocast region): for each token the
    sum over its used slots of weight · expert(x). A token without a used slot gets zeros.

    Raises ValueError for widths that do not fit, an unknown activation or backend.
    """
    check_activation(activation, gated)
    _check_shapes(x_TD, weights_TK, dispatch, w_in, w_out, gated)
    name = backend or default_backend()
    if name not in _BACKENDS:
        raise ValueError(f"backend={name!r} is not available here; use {_choices()}")
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):  # grouped products are not on autocast's list: cast here
        dtype = torch.get_autocast_dtype(device)
        x_TD, w_in, w_out = x_TD.to(dtype), w_in.to(dtype), w_out.to(dtype)
        b_in = None if b_in is None else b_in.to(dtype)
        b_out = None if b_out is None else b_out.to(dtype)
    with torch.autocast(device, enabled=False):
        return _BACKENDS[name](
            x_TD, weights_TK, dispatch, w_in, w_out, b_in, b_out, activation, gated, interleaved
        )


def _choices() -> str:
    return " or ".join(available_backends())


def _check_shapes(
    x_TD: Tensor, weights_TK: Tensor, dispatch: Dispatch, w_in: Tensor, w_out: Tensor, gated: bool
) -> None:
    if x_TD.dim() != 2 or x_TD.shape[1] != w_in.shape[2]:
        raise ValueError(f"tokens have shape {tuple(x_TD.shape)}; these experts take [T, {w_in.shape[2]}]")
    hidden = w_in.shape[1] // 2 if gated else w_in.shape[1]
    if w_out.shape[2] != hidden or w_out.shape[0] != w_in.shape[0]:
        raise ValueError(
            f"w_out has shape {tuple(w_out.shape)} but w_in {tuple(w_in.shape)} "
            f"asks for [{w_in.shape[0]}, O, {hidden}]"
        )
    if weights_TK.shape != (x_TD.shape[0], dispatch.slots):
        raise ValueError(
            f"weights have shape {tuple(weights_TK.shape)}; the dispatch holds "
            f"[{x_TD.shape[0]}, {dispatch.slots}]"
        )
