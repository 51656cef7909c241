"""Weights kept in the kernel's order: the same bits, and never older than the bank."""

import gc

import pytest
import torch
from hypothesis import given, settings
from problems import SILU, moe, problems, run
from torch import nn

from coterie.kernels import Prepacked, grouped_mlp, native, prepack, prepacked, sort_by_expert

reason = native.why_unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"native backend: {reason}")


@pytest.fixture(autouse=True)
def best_instruction_set():
    yield
    if reason is None:
        native.instruction_set()


class Layer(nn.Module):
    """A bank of 12 experts, 96 wide, that packs on every processor, and 90 tokens for it."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        (self.x, self.weights, w_in, w_out), ids = moe(dtype, tokens=90, dim=96, hidden=64)
        self.w_in, self.w_out = nn.Parameter(w_in), nn.Parameter(w_out)
        self.dispatch = sort_by_expert(ids, 12)

    @torch.no_grad()
    def forward(self):
        return native.grouped_mlp(
            self.x, self.weights, self.dispatch, self.w_in, self.w_out, None, None, *SILU
        )

    def nbytes(self):
        return sum(p.nbytes for p in self.parameters())


def fresh(layer):
    """What the layer computes from its weights as they are."""
    with prepacked(Prepacked()):
        return layer()


def warm(layer):
    return [layer() for _ in range(2)][-1]


@pytest.mark.parametrize("instructions", native.INSTRUCTION_SETS)
@settings(deadline=None, max_examples=25)
@given(problem=problems())
def test_the_same_bits_as_without_copies(instructions, problem):
    if native.instruction_set(instructions) != instructions:
        pytest.skip(f"this processor lacks {instructions}")
    tensors, dispatch, options = problem
    plain = run(native.grouped_mlp, tensors, dispatch, options)[0]
    with pytest.MonkeyPatch.context() as patch, prepacked() as copies, torch.no_grad():
        patch.setattr(prepack, "_fits", lambda floats, w: True)  # every width and layout
        banks = [nn.Parameter(t) for t in tensors[2:4]]
        for _ in range(2):
            again = native.grouped_mlp(
                *tensors[:2], dispatch, *banks, *(tensors[4:] or (None, None)), *options
            )
            assert torch.equal(again, plain)
        packable = [1 in w.stride()[1:] for w in banks]  # others are copied at every call
        assert (copies.nbytes > 0) == any(packable)


def test_a_bank_is_packed_at_the_second_call_and_dropped_at_the_end():
    layer = Layer()
    with prepacked() as copies:
        plain = layer()
        assert copies.nbytes == 0
        assert torch.equal(layer(), plain)
        assert copies.nbytes == layer.nbytes()
        with prepacked() as inner:
            assert inner is copies
        assert copies.nbytes == layer.nbytes()
    assert copies.nbytes == 0
    assert torch.equal(layer(), plain)
    assert copies.nbytes == 0


def test_copies_that_are_given_stay_for_the_next_block():
    layer, copies = Layer(), Prepacked()
    with prepacked(copies):
        warm(layer)
    assert copies.nbytes == layer.nbytes()
    with prepacked(copies), prepacked() as inner:
        assert inner is copies
        assert native.profile(layer)["weights packed"] == 0
    copies.clear()
    assert copies.nbytes == 0


def test_the_weights_are_packed_no_more_once_they_are_kept():
    layer = Layer()
    with prepacked():
        warm(layer)
        assert native.profile(layer)["weights packed"] == 0
    assert native.profile(layer)["weights packed"] > 0


def optimizer_step(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    y = native.grouped_mlp(layer.x, layer.weights, layer.dispatch, layer.w_in, layer.w_out, None, None, *SILU)
    y.square().sum().backward()
    optimizer.step()


def in_place(layer):
    with torch.no_grad():
        layer.w_in[3, 5, 7] += 1


def load_state(layer):
    layer.load_state_dict({name: t * 2 for name, t in layer.state_dict().items()})


def load_state_by_assignment(layer):
    layer.load_state_dict({name: t * 2 for name, t in layer.state_dict().items()}, assign=True)


def new_data(layer):
    layer.w_out.data = layer.w_out.data * 2


def an_expert_through_data(layer):
    layer.w_in.data[11] *= 2


def all_through_data(layer):
    layer.w_out.data.mul_(-1)


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        in_place,
        load_state,
        load_state_by_assignment,
        new_data,
        an_expert_through_data,
        all_through_data,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_of_the_weights_is_noticed(change, dtype):
    layer = Layer(dtype)
    with prepacked() as copies:
        before = warm(layer)
        change(layer)
        now = fresh(layer)
        assert not torch.equal(before, now)
        for _ in range(3):
            assert torch.equal(layer(), now)
        assert copies.nbytes <= layer.nbytes()


def test_clear_is_for_what_torch_does_not_count():
    layer = Layer()
    with prepacked() as copies:
        warm(layer)
        layer.w_in.data[0, 1, 1] += 100
        copies.clear()
        assert copies.nbytes == 0
        assert torch.equal(warm(layer), fresh(layer))


def test_another_bank_in_the_memory_of_a_lost_one_is_another_bank():
    with prepacked() as copies:
        for seed in range(4):  # the allocator hands out the same address again
            layer = Layer()
            with torch.no_grad():
                layer.w_in.add_(seed)
            assert torch.equal(warm(layer), fresh(layer))
            del layer
            gc.collect()
        assert copies.nbytes <= Layer().nbytes()


def test_what_is_made_anew_at_each_call_is_never_packed():
    layer = Layer()
    with prepacked() as copies, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(4):
            grouped_mlp(layer.x, layer.weights, layer.dispatch, layer.w_in, layer.w_out, backend="native")
    assert copies.nbytes == 0


def test_a_copy_that_would_be_larger_than_the_bank_is_not_made():
    (x, weights, w_in, w_out), ids = moe(dim=33, hidden=31)
    w_in, w_out, dispatch = nn.Parameter(w_in), nn.Parameter(w_out), sort_by_expert(ids, 12)
    with prepacked() as copies, torch.no_grad():
        for _ in range(3):
            native.grouped_mlp(x, weights, dispatch, w_in, w_out, None, None, *SILU)
        assert copies.nbytes == 0
    native.instruction_set("avx2")  # bfloat16 is widened there
    layer = Layer(torch.bfloat16)
    with prepacked() as copies:
        warm(layer)
        assert copies.nbytes == 0


def test_copies_serve_inference_mode_and_compiled_graphs_and_leave_training_alone():
    layer = Layer()
    plain = layer()
    with prepacked() as copies:
        warm(layer)
        with torch.inference_mode():
            assert torch.equal(layer(), plain)
        y = native.grouped_mlp(
            layer.x, layer.weights, layer.dispatch, layer.w_in, layer.w_out, None, None, *SILU
        )
        y.sum().backward()
        kept = layer.w_in.grad.clone()
        assert torch.equal(y, plain)
        assert copies.nbytes == layer.nbytes()
    layer.w_in.grad = None
    native.grouped_mlp(
        layer.x, layer.weights, layer.dispatch, layer.w_in, layer.w_out, None, None, *SILU
    ).sum().backward()
    assert torch.equal(layer.w_in.grad, kept)


def test_weights_without_a_count_of_changes_are_not_packed():
    with torch.inference_mode():
        layer = Layer()
        with prepacked() as copies:
            warm(layer)
            assert copies.nbytes == 0


def test_a_copy_of_one_instruction_set_is_not_read_by_another():
    layer = Layer()
    with prepacked():
        warm(layer)
        for name in native.INSTRUCTION_SETS:
            native.instruction_set(name)
            assert torch.equal(warm(layer), fresh(layer))
