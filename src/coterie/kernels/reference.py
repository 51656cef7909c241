"""The ground truth: one expert after the other, in plain differentiable torch. Any dtype, any device."""

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
    weights_N = weights_TK.reshape(-1)
    y_TO = x_TD.new_zeros(x_TD.shape[0], w_out.shape[1], dtype=torch.promote_types(x_TD.dtype, torch.float32))
    start = 0
    for e, end in enumerate(dispatch.ends_E.tolist()):
        slots = dispatch.order_N[start:end]
        tokens = slots // dispatch.slots
        pre = F.linear(x_TD[tokens], w_in[e], None if b_in is None else b_in[e])
        hidden = activate(pre, activation, gated, interleaved)
        out = F.linear(hidden, w_out[e], None if b_out is None else b_out[e])
        y_TO = y_TO.index_add(0, tokens, (out * weights_N[slots].unsqueeze(1)).to(y_TO.dtype))
        start = end
    return y_TO.to(x_TD.dtype)
