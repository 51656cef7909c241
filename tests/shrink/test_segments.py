"""An expert is the sum of its neurons."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from coterie.hf import ExpertTensors
from coterie.shrink.segments import align, from_segments, reordered, to_segments

seeds = st.integers(0, 1000)


def bank(seed, *, gated=True, biased=False, dtype=torch.float32):
    """Two experts of 5 neurons that read 3 numbers."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"up": (2, 5, 3), "down": (2, 3, 5)}
    shapes |= {"gate": (2, 5, 3)} if gated else {}
    shapes |= {"up_bias": (2, 5), "down_bias": (2, 3)} if biased else {}
    shapes |= {"gate_bias": (2, 5)} if gated and biased else {}
    return ExpertTensors(**{name: torch.randn(s, generator=g).to(dtype) for name, s in shapes.items()})


def output(experts, e, x_TD):
    """One expert in float64."""
    weights = {name: tensor[e].double() for name, tensor in vars(experts).items() if tensor is not None}
    hidden = x_TD @ weights["up"].T + weights.get("up_bias", 0)
    if "gate" in weights:
        hidden = hidden * F.silu(x_TD @ weights["gate"].T + weights.get("gate_bias", 0))
    else:
        hidden = F.silu(hidden)
    return hidden @ weights["down"].T + weights.get("down_bias", 0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_an_expert_is_the_sum_of_experts_of_one_segment_each(gated, biased):
    experts, x = bank(0, gated=gated, biased=biased), torch.randn(7, 3, dtype=torch.float64)
    segments = to_segments(experts)
    assert segments.shape == (2, 5, (3 if gated else 2) * 3 + (2 if gated else 1) * biased)
    parts = [from_segments(segments[:, i : i + 1], experts) for i in range(5)]
    total = sum(output(part, 1, x) for part in parts)
    if biased:  # each part brought it
        total = total - 4 * experts.down_bias[1].double()
    torch.testing.assert_close(total, output(experts, 1, x))


@given(seeds, st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_segments_written_back_are_the_expert_bit_for_bit(seed, gated, biased, dtype):
    experts = bank(seed, gated=gated, biased=biased, dtype=dtype)
    back = from_segments(to_segments(experts), experts)
    assert to_segments(experts).dtype == torch.float32
    for name, tensor in vars(experts).items():
        assert (tensor is None) == (getattr(back, name) is None), name
        assert tensor is None or torch.equal(tensor, getattr(back, name)), name


@given(seeds, st.permutations(range(5)))
def test_neurons_in_another_order_are_the_same_segments_and_the_same_function(seed, order):
    experts = bank(seed, biased=True)
    moved, x = reordered(experts, torch.tensor(order)), torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(to_segments(moved), to_segments(experts)[:, order])
    torch.testing.assert_close(output(moved, 0, x), output(experts, 0, x))


def test_parts_are_chosen_in_the_order_given_and_a_missing_gate_is_left_out():
    experts = bank(0)
    both = to_segments(experts, ("down", "up"))
    assert torch.equal(both, torch.cat([experts.down.transpose(1, 2), experts.up], 2))
    plain = bank(0, gated=False)
    assert torch.equal(to_segments(plain), to_segments(plain, ("up", "down")))


@pytest.mark.parametrize("parts", [["gate"], [], ["up", "knob"]])
def test_parts_that_do_not_exist_are_refused(parts):
    with pytest.raises(ValueError, match="use some of gate, up, down"):
        to_segments(bank(0, gated=False), parts)


@given(seeds)
def test_alignment_is_the_best_of_all_orders(seed):
    experts = bank(seed)
    own, other = to_segments(experts)

    def likeness(order):
        return float((own * other[list(order)]).sum())

    best = likeness(align(experts, 0, 1).tolist())
    assert best == pytest.approx(max(map(likeness, itertools.permutations(range(5)))), abs=1e-4)
