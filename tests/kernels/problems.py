"""Layers of experts for the tests of the native kernel: random, small, in every layout."""

import torch
from hypothesis import strategies as st

from coterie.kernels import ClampedSwiGLU, native, sort_by_expert


def random_routing(tokens, slots, experts, unused=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :slots]
    return ids.masked_fill(torch.rand(tokens, slots, generator=generator) < unused, -1)


def spread(shape, layout, generator, dtype, scale=1.0):
    """A random tensor whose memory is contiguous, transposed, or a window of a wider one."""
    if layout == "transposed":
        t = torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator).transpose(-1, -2)
    elif layout == "window":
        t = torch.randn(*shape[:-1], shape[-1] + 3, generator=generator)[..., 1:-2]
    elif layout == "strided":
        t = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]
    else:
        t = torch.randn(shape, generator=generator)
    copy = torch.empty_strided(t.shape, t.stride(), dtype=dtype)
    return copy.copy_(t * scale)


@st.composite
def problems(draw, dtypes=(torch.float32, torch.bfloat16)):
    dtype = draw(st.sampled_from(dtypes))
    E = draw(st.integers(1, 9))
    T, K = draw(st.sampled_from([1, 2, 3, 5, 16, 17, 40, 300])), draw(st.integers(1, E))
    D, F, O = (draw(st.sampled_from([1, 2, 15, 31, 32, 33, 64, 100])) for _ in range(3))
    gated, bias = draw(st.booleans()), draw(st.booleans())
    layouts = [draw(st.sampled_from(["plain", "transposed", "window", "strided"])) for _ in range(3)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width = 2 * F if gated else F
    tensors = [
        spread((T, D), layouts[0], generator, dtype),
        spread((T, K), "plain", generator, torch.float32),
        spread((E, width, D), layouts[1], generator, dtype, D**-0.5),
        spread((E, O, F), layouts[2], generator, dtype, F**-0.5),
    ]
    if bias:
        tensors += [spread(s, "plain", generator, dtype) for s in ((E, width), (E, O))]
    unused = draw(st.sampled_from([0.0, 0.3, 1.0]))
    dispatch = sort_by_expert(random_routing(T, K, E, unused, draw(st.integers(0, 99))), E)
    activations = list(native.ACTIVATIONS)
    if gated and dtype == torch.float32:  # rounded to bfloat16, one may be on the limit's other side
        activations += [ClampedSwiGLU(0.7, 1.7, 1.0)] * 2
    options = (draw(st.sampled_from(activations)), gated)
    return tensors, dispatch, options


def run(backend, tensors, dispatch, options, direction=None):
    """The output, and with a direction the gradients too."""
    inputs = [t.detach().requires_grad_(direction is not None) for t in tensors]
    x, weights, w_in, w_out, *biases = inputs
    y = backend(x, weights, dispatch, w_in, w_out, *(biases or (None, None)), *options)
    if direction is None:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, inputs, direction.to(y.dtype))]


def moe(dtype=torch.float32, tokens=70, slots=3, experts=12, dim=96, hidden=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(tokens, dim, generator=generator).to(dtype),
        torch.rand(tokens, slots, generator=generator),
        (torch.randn(experts, 2 * hidden, dim, generator=generator) * dim**-0.5).to(dtype),
        (torch.randn(experts, dim, hidden, generator=generator) * hidden**-0.5).to(dtype),
    ]
    return tensors, random_routing(tokens, slots, experts, seed=seed)


SILU = ("silu", True)
