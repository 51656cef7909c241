import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.kernels import ACTIVATIONS, available_backends, default_backend, grouped_mlp, sort_by_expert


@st.composite
def problems(draw):
    """Everything `grouped_mlp` takes, in float64, with any pattern of empty experts and unused slots."""
    E, D, F, O = (draw(st.integers(1, n)) for n in (6, 9, 7, 5))
    T, K = draw(st.integers(0, 12)), draw(st.integers(1, E))
    gated, bias = draw(st.booleans()), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    experts = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    unused = torch.rand(T, K, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    dispatch = sort_by_expert(experts.masked_fill(unused, -1), E)
    weights = torch.randn(T, K, generator=generator, dtype=torch.float64)
    tensors = [
        randn(T, D),
        weights.masked_fill(unused, 0).requires_grad_(),
        randn(E, 2 * F if gated else F, D),
        randn(E, O, F),
    ]
    biases = [randn(E, 2 * F if gated else F), randn(E, O)] if bias else [None, None]
    return tensors, biases, dispatch, {"activation": draw(st.sampled_from(list(ACTIVATIONS))), "gated": gated}


def run(tensors, biases, dispatch, options, backend):
    x, weights, w_in, w_out = tensors
    return grouped_mlp(x, weights, dispatch, w_in, w_out, *biases, **options, backend=backend)


@given(problems())
def test_torch_agrees_with_the_reference_forward_and_backward(problem):
    tensors, biases, dispatch, options = problem
    inputs = [t for t in [*tensors, *biases] if t is not None]
    results = {}
    for backend in ("reference", "torch"):
        y = run(tensors, biases, dispatch, options, backend)
        direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results[backend] = [y, *torch.autograd.grad((y * direction).sum(), inputs)]
    for ours, truth in zip(results["torch"], results["reference"], strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_are_those_of_finite_differences(backend, gated):
    dispatch = sort_by_expert(torch.tensor([[0, 2], [2, -1], [0, 1]]), 4)
    sizes = [(3, 5), (3, 2), (4, 6, 5), (4, 2, 3 if gated else 6), (4, 6), (4, 2)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
    inputs[1].data[1, 1] = 0

    def f(x, weights, w_in, w_out, b_in, b_out):
        return grouped_mlp(x, weights, dispatch, w_in, w_out, b_in, b_out, gated=gated, backend=backend)

    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_close_to_float64(dtype):
    dispatch = sort_by_expert(torch.rand(40, 6).argsort(1)[:, :3], 6)
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((40, 32), (40, 3), (6, 32, 32), (6, 32, 16))]
    truth = run(tensors, [None, None], dispatch, {}, "reference")
    x, weights, w_in, w_out = tensors
    low = [x.to(dtype), weights.float(), w_in.to(dtype), w_out.to(dtype)]
    for backend in ("reference", "torch"):
        y = run(low, [None, None], dispatch, {}, backend)
        assert y.dtype == dtype
        assert (y - truth).norm() / truth.norm() < {torch.float32: 1e-6}.get(dtype, 1e-2)


def test_torch_is_deterministic_and_takes_strided_inputs():
    dispatch = sort_by_expert(torch.rand(30, 4).argsort(1)[:, :2], 4)
    x, weights = torch.randn(8, 30).t(), torch.rand(2, 30).t()
    w_in, w_out = torch.randn(4, 8, 12).transpose(1, 2), torch.randn(4, 6, 8).transpose(1, 2)
    one = grouped_mlp(x, weights, dispatch, w_in, w_out, backend="torch")
    assert torch.equal(one, grouped_mlp(x, weights, dispatch, w_in, w_out, backend="torch"))
    torch.testing.assert_close(one, grouped_mlp(x, weights, dispatch, w_in, w_out, backend="reference"))


def test_the_backend_is_chosen_by_argument_then_environment(monkeypatch):
    monkeypatch.setenv("COTERIE_KERNEL", "reference")
    assert default_backend() == "reference"
    monkeypatch.setenv("COTERIE_KERNEL", "cuda9")
    with pytest.raises(
        ValueError, match="COTERIE_KERNEL='cuda9' is not available here; use reference or torch"
    ):
        default_backend()
    monkeypatch.delenv("COTERIE_KERNEL")
    assert default_backend() == available_backends()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TD": torch.zeros(2, 9)}, r"tokens have shape \(2, 9\); these experts take \[T, 4\]"),
        ({"w_out": torch.zeros(3, 4, 5)}, r"w_out has shape \(3, 4, 5\)"),
        ({"weights_TK": torch.zeros(2, 2)}, r"weights have shape \(2, 2\); the dispatch holds \[2, 1\]"),
        ({"activation": "cubic"}, "activation='cubic' is not known; use one of silu"),
        ({"backend": "abacus"}, "backend='abacus' is not available here"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "x_TD": torch.zeros(2, 4),
        "weights_TK": torch.ones(2, 1),
        "dispatch": sort_by_expert(torch.tensor([[0], [1]]), 3),
        "w_in": torch.zeros(3, 12, 4),
        "w_out": torch.zeros(3, 4, 6),
    }
    with pytest.raises(ValueError, match=message):
        grouped_mlp(**(arguments | change))
