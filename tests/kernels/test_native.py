"""The native CPU backend against the float64 reference, and what it promises beside the numbers."""

import gc
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import SILU, moe, problems, random_routing, run

from coterie.kernels import (
    grouped_mlp,
    native,
    native_library,
    reference,
    sort_by_expert,
)

reason = native.why_unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"native backend: {reason}")

LIMIT = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
few = settings(deadline=None, max_examples=25)


@pytest.fixture(autouse=True)
def two_threads_and_the_best_instruction_set():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    if reason is None:
        native.instruction_set()


def double(tensors):
    return [t.double() for t in tensors]


def relative(ours, truth):
    return float((ours.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def scales(tensors, dispatch, options, direction, truth):
    """What an error is measured against: the norm of each result, or how far the result moves per unit of
    relative change of the inputs (four random ones), where terms cancel and no summation could do better."""
    generator = torch.Generator().manual_seed(0)
    moves = []
    for _ in range(4):
        moved = [t * (1 + 1e-5 * torch.randn(t.shape, generator=generator, dtype=t.dtype)) for t in tensors]
        results = run(reference.grouped_mlp, moved, dispatch, options, direction)
        moves.append([float((a - b).norm()) / 1e-5 for a, b in zip(results, truth, strict=True)])
    root_mean_square = torch.tensor(moves).square().mean(0).sqrt().tolist()
    return [max(float(b.norm()), move) for b, move in zip(truth, root_mean_square, strict=True)]


@pytest.mark.parametrize("instructions", native.INSTRUCTION_SETS)
@few
@given(problem=problems())
def test_output_and_gradients_match_the_float64_reference(instructions, problem):
    if native.instruction_set(instructions) != instructions:
        pytest.skip(f"this processor lacks {instructions}")
    tensors, dispatch, options = problem
    wide = double(tensors)
    direction = torch.randn(len(wide[0]), wide[3].shape[1], dtype=torch.float64).to(tensors[0].dtype).double()
    ours = run(native.grouped_mlp, tensors, dispatch, options, direction)
    truth = run(reference.grouped_mlp, wide, dispatch, options, direction)
    limit = LIMIT[tensors[0].dtype]
    measures = scales(wide, dispatch, options, direction, truth)
    for a, b, like, scale in zip(ours, truth, [ours[0], *tensors], measures, strict=True):
        assert a.shape == b.shape
        assert a.dtype == like.dtype
        assert float((a.double() - b).norm()) <= limit * scale


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@pytest.mark.parametrize("instructions", native.INSTRUCTION_SETS)
def test_activations_are_accurate_over_their_whole_range(activation, instructions):
    """x ↦ act(x) for one expert with w_in = w_out = 1, and its derivative."""
    native.instruction_set(instructions)
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -100.0, -0.0, 1e-6, 60.0])])
    one, dispatch = torch.ones(1, 1, 1), sort_by_expert(torch.zeros(len(x), 1, dtype=torch.int64), 1)
    tensors = [x.unsqueeze(1), torch.ones(len(x), 1), one, one]
    direction = torch.ones(len(x), 1, dtype=torch.float64)
    ours = run(native.grouped_mlp, tensors, dispatch, (activation, False), direction)
    truth = run(reference.grouped_mlp, double(tensors), dispatch, (activation, False), direction)
    for a, b in zip(ours[:2], truth[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("dtype", LIMIT)
def test_a_wide_bank_of_512_experts_with_every_one_used(dtype):
    tensors, ids = moe(dtype, tokens=8, slots=512, experts=512, dim=16, hidden=8)
    dispatch = sort_by_expert(ids, 512)
    direction = torch.randn(8, 16, dtype=torch.float64)
    ours = run(native.grouped_mlp, tensors, dispatch, SILU, direction.to(dtype))
    truth = run(reference.grouped_mlp, double(tensors), dispatch, SILU, direction.to(dtype).double())
    for a, b in zip(ours, truth, strict=True):
        assert relative(a, b) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", LIMIT)
def test_sums_longer_than_one_block_and_groups_larger_than_one_chunk(dtype):
    tensors, ids = moe(dtype, tokens=600, slots=2, experts=2, dim=2100, hidden=1100)
    dispatch = sort_by_expert(ids, 2)
    direction = torch.randn(600, 2100, dtype=torch.float64).to(dtype)
    ours = run(native.grouped_mlp, tensors, dispatch, SILU, direction)
    truth = run(reference.grouped_mlp, double(tensors), dispatch, SILU, direction.double())
    for a, b in zip(ours, truth, strict=True):
        assert relative(a, b) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", LIMIT)
@few
@given(tokens=st.integers(1, 60), seed=st.integers(0, 9))
def test_a_token_gets_the_same_bits_whatever_the_other_tokens(dtype, tokens, seed):
    (x, weights, w_in, w_out), ids = moe(dtype, seed=seed)
    together = run(native.grouped_mlp, [x, weights, w_in, w_out], sort_by_expert(ids, 12), SILU)[0]
    pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:tokens]
    alone = [x[pick], weights[pick], w_in, w_out]
    assert torch.equal(run(native.grouped_mlp, alone, sort_by_expert(ids[pick], 12), SILU)[0], together[pick])


@pytest.mark.parametrize("dtype", LIMIT)
def test_same_bits_for_any_number_of_threads_and_every_time(dtype):
    tensors, ids = moe(dtype, tokens=500)
    dispatch, direction = sort_by_expert(ids, 12), torch.randn(500, 96)
    torch.set_num_threads(1)
    first = run(native.grouped_mlp, tensors, dispatch, SILU, direction)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        again = run(native.grouped_mlp, tensors, dispatch, SILU, direction)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4, 70])
def test_a_token_may_have_an_expert_twice(dtype, tokens):
    tensors, _ = moe(dtype, tokens=tokens)
    ids = torch.randint(3, (tokens, 3), generator=torch.Generator().manual_seed(0))  # of three: many twice
    direction = torch.randn(tokens, 96, dtype=torch.float64).to(dtype).double()
    ours = run(native.grouped_mlp, tensors, sort_by_expert(ids, 12), SILU, direction)
    truth = run(reference.grouped_mlp, double(tensors), sort_by_expert(ids, 12), SILU, direction)
    for a, b in zip(ours, truth, strict=True):
        assert relative(a, b) < LIMIT[dtype]


def test_the_weight_of_an_unused_slot_is_never_read():
    tensors, ids = moe()
    dispatch = sort_by_expert(ids, 12)
    clean = run(native.grouped_mlp, tensors, dispatch, SILU, tensors[0])
    tensors[1] = tensors[1].masked_fill(ids < 0, torch.nan)
    dirty = run(native.grouped_mlp, tensors, dispatch, SILU, tensors[0])
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert bool((clean[2][ids < 0] == 0).all())


def test_changed_weights_are_noticed_by_the_next_call():
    tensors, ids = moe()
    dispatch, w_in = sort_by_expert(ids, 12), tensors[2]
    run(native.grouped_mlp, tensors, dispatch, SILU)
    for change in (lambda: w_in.mul_(1.5), lambda: w_in.data.add_(0.1), lambda: w_in.numpy().fill(0.01)):
        change()
        truth = run(reference.grouped_mlp, double(tensors), dispatch, SILU)[0]
        assert relative(run(native.grouped_mlp, tensors, dispatch, SILU)[0], truth) < 1e-6


def test_a_nan_token_spoils_only_itself():
    tensors, ids = moe()
    ids[:, 0] = ids[:, 0].clamp(min=0)
    dispatch = sort_by_expert(ids, 12)
    clean = run(native.grouped_mlp, tensors, dispatch, SILU)[0]
    tensors[0][5] = torch.nan
    dirty = run(native.grouped_mlp, tensors, dispatch, SILU)[0]
    others = torch.arange(len(clean)) != 5
    assert bool(dirty[5].isnan().all())
    assert torch.equal(dirty[others], clean[others])


def test_inference_mode_and_no_grad_give_the_trained_bits():
    tensors, ids = moe()
    dispatch = sort_by_expert(ids, 12)
    with_graph = run(native.grouped_mlp, tensors, dispatch, SILU, tensors[0])[0]
    with torch.inference_mode():
        inference = grouped_mlp(*tensors[:2], dispatch, *tensors[2:], backend="native")
        assert torch.equal(inference, with_graph)
    with torch.no_grad():
        assert torch.equal(grouped_mlp(*tensors[:2], dispatch, *tensors[2:], backend="native"), with_graph)


def test_only_the_gradients_asked_for_are_computed():
    tensors, ids = moe()
    dispatch = sort_by_expert(ids, 12)
    everything = run(native.grouped_mlp, tensors, dispatch, SILU, tensors[0])
    for i in range(4):
        inputs = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        y = native.grouped_mlp(*inputs[:2], dispatch, *inputs[2:], None, None, *SILU)
        y.backward(tensors[0])
        assert torch.equal(inputs[i].grad, everything[i + 1])
        assert all(t.grad is None for j, t in enumerate(inputs) if j != i)


def test_compiles_into_a_full_graph_forward_and_backward():
    tensors, ids = moe()

    def layer(x, weights, w_in, w_out):
        return grouped_mlp(x * 2, weights, sort_by_expert(ids, 12), w_in, w_out, backend="native").sin()

    inputs = [t.requires_grad_() for t in tensors]
    eager = layer(*inputs)
    compiled = torch.compile(layer, fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(
        torch.autograd.grad(compiled.sum(), inputs), torch.autograd.grad(eager.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_custom_ops_pass_torchs_own_checks():
    tensors, ids = moe(tokens=5, dim=8, hidden=8)
    dispatch = sort_by_expert(ids, 12)
    x, weights, w_in, w_out = (t.requires_grad_() for t in tensors)
    arguments = (
        x,
        weights,
        dispatch.order_N,
        dispatch.ends_E,
        w_in,
        w_out,
        None,
        None,
        0,
        [],
        True,
        False,
        True,
    )
    torch.library.opcheck(
        torch.ops.coterie.native_mlp.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_autocast_computes_in_bfloat16():
    tensors, ids = moe()
    dispatch = sort_by_expert(ids, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_mlp(*tensors[:2], dispatch, *tensors[2:], backend="native")
    low = [t if i == 1 else t.bfloat16() for i, t in enumerate(tensors)]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, run(native.grouped_mlp, low, dispatch, SILU)[0])


@pytest.mark.parametrize(
    ("dtype", "activation"), [(torch.float64, "silu"), (torch.float16, "silu"), (torch.float32, "tanh")]
)
def test_what_it_lacks_is_computed_by_the_torch_backend(dtype, activation):
    tensors, ids = moe(dtype)
    dispatch = sort_by_expert(ids, 12)
    y = run(native.grouped_mlp, tensors, dispatch, (activation, True))[0]
    truth = run(reference.grouped_mlp, double(tensors), dispatch, (activation, True))[0]
    assert y.dtype == dtype
    assert relative(y, truth) < {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-2}[dtype]


def test_no_tokens_and_no_used_slot():
    tensors, _ = moe()
    x, weights, w_in, w_out = tensors
    nothing = sort_by_expert(torch.empty(0, 3, dtype=torch.int64), 12)
    assert native.grouped_mlp(x[:0], weights[:0], nothing, w_in, w_out, None, None, *SILU).shape == (0, 96)
    unused = sort_by_expert(torch.full((70, 3), -1), 12)
    for result in run(native.grouped_mlp, tensors, unused, SILU, x):
        assert not result.any()


def test_second_derivatives_are_those_of_the_reference():
    tensors, ids = moe(tokens=6, dim=8, hidden=8)
    dispatch = sort_by_expert(ids, 12)

    def penalty(backend, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in tensors]
        y = backend(*inputs[:2], dispatch, *inputs[2:], None, None, *SILU)
        (slope,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(slope.square().sum(), inputs)

    ours = penalty(native.grouped_mlp, torch.float32)
    for a, b in zip(ours, penalty(reference.grouped_mlp, torch.float64), strict=True):
        assert relative(a, b) < 1e-5


def test_sorting_agrees_with_the_torch_one():
    ids = random_routing(200, 3, 12, unused=0.2)
    ours, theirs = native.sort_by_expert(ids, 12), sort_by_expert(ids, 12)
    assert torch.equal(ours.order_N, theirs.order_N)
    assert torch.equal(ours.ends_E, theirs.ends_E)


def test_released_gradients_are_reused_and_can_be_given_up():
    tensors, ids = moe(experts=16, dim=256, hidden=256)
    dispatch = sort_by_expert(ids, 16)
    native.release_memory()
    grads = run(native.grouped_mlp, tensors, dispatch, SILU, tensors[0])
    address, bytes_of_w_in = grads[3].data_ptr(), grads[3].nbytes
    kept = grads[3].clone()
    del grads
    gc.collect()
    again = run(native.grouped_mlp, tensors, dispatch, SILU, tensors[0])
    assert again[3].data_ptr() == address
    assert torch.equal(again[3], kept)
    del again
    gc.collect()
    assert native.release_memory() >= bytes_of_w_in
    assert native.release_memory() == 0


def compute_and_send(connection, tensors, dispatch):
    connection.send(run(native.grouped_mlp, tensors, dispatch, SILU)[0].tolist())


def test_a_profile_shares_out_the_time_and_changes_no_bit():
    x, weights = torch.randn(64, 32), torch.rand(64, 2)
    dispatch = sort_by_expert(torch.randint(4, (64, 2)), 4)
    w_in = torch.randn(4, 48, 32, requires_grad=True)
    w_out = torch.randn(4, 32, 24, requires_grad=True)

    def run():
        y = grouped_mlp(x, weights, dispatch, w_in, w_out, backend="native")
        return y, *torch.autograd.grad(y.sum(), [w_in, w_out])

    results = []
    shares = native.profile(lambda: results.append(run()))
    assert abs(sum(shares.values()) - 1) < 1e-6
    assert set(shares) == {*native_library.PROFILE, "everything else"}
    assert all(shares[kind] > 0 for kind in native_library.PROFILE)
    for ours, plain in zip(results[0], run(), strict=True):
        assert torch.equal(ours, plain)
    quiet = native.profile(lambda: None)  # what ran unprofiled before does not count
    assert quiet["products"] == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_works_in_a_fork_of_a_process_that_used_it():
    tensors, ids = moe()  # made here: torch's own operators may hang in a fork with more than one thread
    dispatch = sort_by_expert(ids, 12)
    ours = run(native.grouped_mlp, tensors, dispatch, SILU)[0]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=compute_and_send, args=(sender, tensors, dispatch), daemon=True)
    child.start()
    try:
        assert receiver.poll(20), "the forked child hangs"
        assert receiver.recv() == ours.tolist()
        child.join(20)
        assert child.exitcode == 0
    finally:
        child.kill()


def test_without_the_library_one_line_says_so_and_torch_takes_over():
    code = "from coterie.kernels import native, available_backends as b; print(b(), native.why_unavailable())"
    environment = os.environ | {"COTERIE_NATIVE_LIBRARY": "/nowhere/_native.so", "COTERIE_KERNEL": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['reference', 'torch'] /nowhere/_native.so is missing")
    assert done.stdout.count("\n") == 1
