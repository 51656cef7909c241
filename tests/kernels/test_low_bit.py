"""Packed low-bit experts against the float64 product of their dequantised weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.kernels import PackedBank, PackedWeight, available_backends, low_bit_mlp, native, sort_by_expert
from coterie.kernels.packed import BITS, level_range

reason = native.why_unavailable()
needs_native = pytest.mark.skipif(reason is not None, reason=f"native backend: {reason}")
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
few = settings(deadline=None, max_examples=20)


@pytest.fixture(autouse=True)
def _the_best_instruction_set_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if reason is None:
        native.instruction_set()


def random_packed(shape, bits, group_size, generator, *, zeros=True, input_scale=None):
    low, high = level_range(bits)
    levels = torch.randint(low, high + 1, shape, generator=generator)
    levels = levels.where(levels != 0, 1) if bits == 1 else levels
    columns = shape[-1]
    groups = 1 if group_size == -1 else -(-columns // group_size)
    scales = (torch.rand(*shape[:-1], groups, generator=generator) + 0.5) / (high * columns**0.5)
    offsets = torch.randint(low, high + 1, scales.shape, generator=generator) if zeros and bits > 1 else None
    return PackedWeight.from_levels(
        levels, bits, scales=scales, zeros=offsets, input_scale=input_scale, group_size=group_size
    )


def random_bank(widths, dim, hidden, out, *, gated=True, group_size=32, zeros=True, scaled=False, seed=0):
    """One expert for each of `widths`, the bits."""
    generator = torch.Generator().manual_seed(seed)
    count, w_in, w_out = 2 if gated else 1, [], []
    for bits in widths:
        inputs = torch.rand(1, dim, generator=generator).add(0.5).expand(count, dim) if scaled else None
        inner = torch.rand(hidden, generator=generator) + 0.5 if scaled else None
        options = {"zeros": zeros, "generator": generator, "bits": bits, "group_size": group_size}
        w_in.append(random_packed((count, hidden, dim), input_scale=inputs, **options))
        w_out.append(random_packed((out, hidden), input_scale=inner, **options))
    return PackedBank(w_in, w_out)


def random_tokens(tokens, slots, bank, dtype, *, unused=0.2, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, len(bank), generator=generator).argsort(1)[:, :slots]
    ids = ids.masked_fill(torch.rand(tokens, slots, generator=generator) < unused, -1)
    x = torch.randn(tokens, bank.dim, generator=generator).to(dtype)
    weights = torch.randn(tokens, slots, generator=generator)
    biases = [None, None]
    if bias:
        wide = bank.hidden * (2 if bank.gated else 1)
        shapes = [(len(bank), wide), (len(bank), bank.out)]
        biases = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    return x, weights, sort_by_expert(ids, len(bank)), bank, *biases


def in_double(x, weights, dispatch, bank, b_in, b_out):
    biases = [None if b is None else b.double() for b in (b_in, b_out)]
    return x.double(), weights.double(), dispatch, bank, *biases


def truth(problem, activation="silu"):
    """One token and one expert at a time, in float64, from the dequantised weights."""
    x, weights, dispatch, bank, b_in, b_out = in_double(*problem)
    act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[activation]
    y = torch.zeros(len(x), bank.out, dtype=torch.float64)
    start = 0
    for e, end in enumerate(dispatch.ends_E.tolist()):
        w_in, w_out = bank.w_in[e].dequantize(torch.float64), bank.w_out[e].dequantize(torch.float64)
        for slot in dispatch.order_N[start:end].tolist():
            token = slot // dispatch.slots
            first = torch.einsum("mfd,d->mf", w_in, x[token]).flatten()
            first = first if b_in is None else first + b_in[e]
            hidden = act(first[: bank.hidden]) * (first[bank.hidden :] if bank.gated else 1)
            out = w_out @ hidden
            out = out if b_out is None else out + b_out[e]
            y[token] += weights.flatten()[slot] * out
        start = end
    return y


def relative(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@st.composite
def problems(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    widths = draw(st.lists(st.sampled_from(BITS), min_size=1, max_size=6))
    dim, hidden, out = (draw(st.sampled_from([1, 15, 16, 17, 32, 33, 95, 130, 300])) for _ in range(3))
    bank = random_bank(
        widths,
        dim,
        hidden,
        out,
        gated=draw(st.booleans()),
        group_size=draw(st.sampled_from([-1, 32, 64, 96, 128])),
        zeros=draw(st.booleans()),
        scaled=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
    return random_tokens(
        draw(st.sampled_from([1, 2, 3, 4, 5, 9, 16, 40])),
        draw(st.integers(1, len(widths))),
        bank,
        dtype,
        unused=draw(st.sampled_from([0.0, 0.3, 1.0])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@needs_native
@pytest.mark.parametrize("instructions", native.INSTRUCTION_SETS)
@few
@given(problem=problems(), activation=st.sampled_from(["silu", "gelu"]))
def test_native_matches_float64_for_any_bits_shape_and_routing(instructions, problem, activation):
    if native.instruction_set(instructions) != instructions:
        pytest.skip(f"this processor lacks {instructions}")
    exact = truth(problem, activation)
    ours = low_bit_mlp(*problem, activation=activation, backend="native")
    assert ours.dtype == problem[0].dtype
    # Where terms cancel no summation does better than the problem's own sensitivity to its inputs.
    moved = truth((problem[0].double() * (1 + 1e-6), *problem[1:]), activation)
    scale = max(float(exact.norm()), float((moved - exact).norm()) / 1e-6)
    assert float((ours.double() - exact).norm()) <= LIMIT[problem[0].dtype] * scale


@needs_native
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("instructions", native.INSTRUCTION_SETS)
def test_native_is_within_the_promised_error_of_float64(instructions, bits, dtype):
    if native.instruction_set(instructions) != instructions:
        pytest.skip(f"this processor lacks {instructions}")
    bank = random_bank([bits] * 3, 520, 200, 77, group_size=128, scaled=True)
    for tokens in (1, 16):
        problem = random_tokens(tokens, 2, bank, dtype, unused=0.0, bias=True)
        assert relative(low_bit_mlp(*problem, backend="native"), truth(problem)) < LIMIT[dtype]


@pytest.mark.parametrize("backend", available_backends())
@given(problem=problems())
@settings(deadline=None, max_examples=10)
def test_every_backend_agrees_with_float64(backend, problem):
    problem = in_double(*problem)
    ours = low_bit_mlp(*problem, backend=backend)
    torch.testing.assert_close(ours, truth(problem), rtol=1e-9, atol=1e-9)


@needs_native
@pytest.mark.parametrize("instructions", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", LIMIT)
def test_a_token_gets_the_same_bits_in_any_batch_with_any_number_of_threads(dtype, instructions):
    if native.instruction_set(instructions) != instructions:
        pytest.skip(f"this processor lacks {instructions}")
    bank = random_bank(BITS, 160, 96, 64)
    x, weights, dispatch, *_ = random_tokens(37, 3, bank, dtype)
    ids = torch.full((37 * 3,), -1)
    start = 0
    for e, end in enumerate(dispatch.ends_E.tolist()):
        ids[dispatch.order_N[start:end]], start = e, end
    ids = ids.view(37, 3)
    torch.set_num_threads(1)
    together = low_bit_mlp(x, weights, dispatch, bank, backend="native")
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(low_bit_mlp(x, weights, dispatch, bank, backend="native"), together)
    for size in (1, 2, 3, 6):
        pick = torch.randperm(37)[:size]
        alone = low_bit_mlp(
            x[pick], weights[pick], sort_by_expert(ids[pick], len(bank)), bank, backend="native"
        )
        assert torch.equal(alone, together[pick])


@needs_native
def test_more_tokens_of_one_expert_than_a_chunk_holds():
    bank = random_bank([4, 2], 64, 48, 40)
    problem = random_tokens(600, 1, bank, torch.float32)
    assert relative(low_bit_mlp(*problem, backend="native"), truth(problem)) < 1e-5


@needs_native
def test_the_weight_of_an_unused_slot_and_an_idle_expert_are_never_read():
    bank = random_bank([3, 4, 1], 64, 48, 40)
    x, weights, _, _, _, _ = random_tokens(6, 2, bank, torch.float32)
    dispatch = sort_by_expert(torch.tensor([[0, -1]] * 6), 3)
    clean = low_bit_mlp(x, weights, dispatch, bank, backend="native")
    bank.w_in[1].scales.fill_(float("nan"))
    weights[:, 1] = float("nan")
    assert torch.equal(low_bit_mlp(x, weights, dispatch, bank, backend="native"), clean)


@needs_native
def test_padding_is_never_part_of_a_result():
    """Rows past `out` and columns past `in` hold zeros of their own; garbage there must not matter."""
    weight = random_packed((2, 17, 33), 4, 32, torch.Generator().manual_seed(0))
    down = random_packed((9, 17), 4, 32, torch.Generator().manual_seed(1))
    problem = random_tokens(3, 1, PackedBank([weight], [down]), torch.bfloat16)
    clean = low_bit_mlp(*problem, backend="native")
    for w in (weight, down):
        w.scales[..., -1, :, w.out % 16 :] = float("nan")
    assert torch.equal(low_bit_mlp(*problem, backend="native"), clean)


def test_gradients_reach_tokens_and_combine_weights():
    bank = random_bank([4, 2, 8], 24, 20, 12)
    x, weights, dispatch, *_ = random_tokens(5, 2, bank, torch.float64)
    inputs = (x.requires_grad_(), weights.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: low_bit_mlp(a, b, dispatch, bank), inputs)


@given(
    bits=st.sampled_from(BITS), out=st.integers(1, 40), columns=st.integers(1, 100), seed=st.integers(0, 99)
)
def test_levels_survive_packing_in_exactly_their_bits(bits, out, columns, seed):
    weight = random_packed((2, out, columns), bits, 32, torch.Generator().manual_seed(seed))
    again = PackedWeight.from_levels(
        weight.levels(), bits, scales=torch.ones(2, out, -(-columns // 32)), group_size=32
    )
    assert torch.equal(again.codes, weight.codes)
    padded = 2 * (-(-out // 16) * 16) * (-(-columns // 32) * 32)
    assert weight.codes.nbytes * 8 == padded * bits


def test_zero_point_scale_and_input_scale_mean_what_the_docstring_says():
    levels, zeros = torch.tensor([[3, -4], [0, 1]]), torch.tensor([[1], [-2]])
    weight = PackedWeight.from_levels(
        levels, 3, scales=torch.tensor([[0.5], [2.0]]), zeros=zeros, input_scale=torch.tensor([10.0, 1.0])
    )
    assert weight.dequantize().tolist() == [[10.0, -2.5], [40.0, 6.0]]
    assert weight.shape == (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits=5 cannot be packed; use one of"),
        ({"levels": torch.full((2, 40), 9)}, "levels of 4 bits are -8 … 7"),
        ({"bits": 1, "levels": torch.zeros(2, 40)}, "-1 or 1"),
        ({"group_size": 48}, "group_size=48; use a multiple of 32"),
        ({"scales": torch.ones(2, 1)}, r"scales have shape \(2, 1\); these levels take \(2, 2\)"),
    ],
)
def test_what_cannot_be_packed_is_refused(change, message):
    options = {"levels": torch.ones(2, 40), "bits": 4, "scales": torch.ones(2, 2), "group_size": 32} | change
    with pytest.raises(ValueError, match=message):
        PackedWeight.from_levels(options.pop("levels"), options.pop("bits"), **options)


def test_a_bank_refuses_experts_that_do_not_fit_each_other():
    bank, other = random_bank([4], 32, 48, 16), random_bank([4], 64, 48, 16)
    with pytest.raises(ValueError, match="one shape"):
        PackedBank(bank.w_in + other.w_in, bank.w_out + other.w_out)
    with pytest.raises(ValueError, match="one shape; found no experts"):
        PackedBank([], [])
    generator = torch.Generator()
    uneven = random_packed((2, 48, 32), 4, 32, generator, input_scale=torch.rand(2, 32))
    with pytest.raises(ValueError, match="different input scales"):
        PackedBank([uneven], bank.w_out)


def test_tokens_and_backends_that_do_not_fit_are_refused():
    x, weights, dispatch, bank, *_ = random_tokens(3, 1, random_bank([4, 4], 32, 48, 16), torch.float32)
    with pytest.raises(ValueError, match=r"take \[T, 32\]"):
        low_bit_mlp(x[:, :5], weights, dispatch, bank)
    with pytest.raises(ValueError, match="2 experts"):
        low_bit_mlp(x, weights, sort_by_expert(torch.zeros(3, 1, dtype=torch.int64), 3), bank)
    with pytest.raises(ValueError, match="backend='fast' is not available"):
        low_bit_mlp(x, weights, dispatch, bank, backend="fast")
