"""Experts are dropped, and their neurons go on in those that stay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import grouped, tiny
from torch.nn import functional as F
from transformers import GptOssConfig, GptOssForCausalLM

from coterie.hf import find_moe_blocks
from coterie.shrink import dern
from coterie.shrink.dern import nearest_neurons
from coterie.shrink.segments import from_segments, reordered, to_segments

SCORE = torch.tensor([0.1, 0.25, 0.02, 0.2, 0.05, 0.15, 0.03, 0.2])  # kept, of 4: 1, 3, 5, 7
KEPT = [1, 3, 5, 7]


@pytest.fixture
def block(model):
    return find_moe_blocks(model)[0]


def tensors(block):
    return {name: t.clone() for name, t in vars(block.experts).items() if t is not None}


def with_twins(block, *, noise=0.0):
    """Experts 0, 2, 4, 6 become 1, 3, 5, 7 with their neurons in another order."""
    orders = {}
    for twin in (0, 2, 4, 6):
        orders[twin] = torch.randperm(24)
        copied = reordered(block.experts[[twin + 1]], orders[twin])
        copied.up += noise * torch.randn_like(copied.up)
        block.replace([twin], copied)
    return orders


def test_every_neuron_of_a_permuted_copy_finds_its_twin(block):
    orders = with_twins(block)
    for twin in orders:
        owner_F, cosine_F = nearest_neurons(block.experts, twin, KEPT)
        assert owner_F.tolist() == [KEPT.index(twin + 1)] * 24
        torch.testing.assert_close(cosine_F, torch.ones(24))


def test_permuted_copies_recombine_into_the_expert_they_are_copies_of(block):
    with_twins(block)
    before = block.experts[KEPT]
    done = dern(block, SCORE, 4)
    assert done.kept == KEPT
    assert done.moved == 1
    assert done.cosine == pytest.approx(1)
    assert done.members == [[1, 0], [3, 2], [5, 4], [7, 6]]
    assert done.transfer.sum(0).tolist() == [1] * 8
    for name, tensor in vars(block.experts).items():
        if tensor is not None:
            torch.testing.assert_close(tensor, getattr(before, name), rtol=0, atol=1e-5)


def plain_dern(experts, score, kept, threshold):
    """The whole method in float64, neuron by neuron; returns segments and the transfer matrix."""
    segments, similar = (
        to_segments(experts, parts).double() for parts in (("gate", "up", "down"), ("up", "down"))
    )
    pool = {k: [(score[k], s) for s in segments[k]] for k in kept}
    transfer = torch.zeros(len(kept), len(score))
    for row, k in enumerate(kept):
        transfer[row, k] = 1
    hidden = segments.shape[1]
    for e in set(range(len(score))) - set(kept):
        for i in range(hidden):
            cosines = {
                k: max(float(F.cosine_similarity(similar[e, i], other, dim=0)) for other in similar[k])
                for k in kept
            }
            best = max(cosines, key=cosines.get)
            if cosines[best] > threshold:
                pool[best].append((score[e], segments[e, i]))
                transfer[kept.index(best), e] += 1 / hidden
    made = []
    for k in kept:
        centres = [s / s.norm() for s in segments[k]]
        for _ in range(20):
            owner = [max(range(hidden), key=lambda c: float(s @ centres[c])) for _, s in pool[k]]
            for c in range(hidden):
                mine = [w * s / s.norm() for (w, s), o in zip(pool[k], owner, strict=True) if o == c]
                if mine:
                    total = sum(mine)
                    centres[c] = total / total.norm()
        owner = [max(range(hidden), key=lambda c: float(s @ centres[c])) for _, s in pool[k]]
        for c in range(hidden):
            mine = [(w, s.norm()) for (w, s), o in zip(pool[k], owner, strict=True) if o == c]
            length = sum(w * n for w, n in mine) / sum(w for w, _ in mine) if mine else segments[k, c].norm()
            made.append(centres[c] * length)
    return torch.stack(made).view(len(kept), hidden, -1), transfer


def test_it_is_what_the_steps_of_the_paper_give_neuron_by_neuron():
    model = tiny(hidden_size=8, moe_intermediate_size=6, num_experts=5)
    block = find_moe_blocks(model)[0]
    score = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=torch.float64)
    rows, before = block.router.rows.clone(), block.experts[list(range(5))]
    wanted, transfer = plain_dern(before, score, [1, 2, 3], 0.3)
    assert 0.1 < transfer[:, [0, 4]].sum() / 2 < 0.9, "some neurons should move and some not"
    done = dern(block, score, 3, threshold=0.3)
    torch.testing.assert_close(done.transfer, transfer)
    torch.testing.assert_close(to_segments(block.experts).double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(block.router.rows, rows[[1, 2, 3]])


def test_at_threshold_1_experts_are_only_dropped_bit_for_bit(block):
    before = tensors(block)
    done = dern(block, SCORE, 4, threshold=1)
    assert done.moved == 0
    assert done.members == [[k] for k in KEPT]
    for name, tensor in tensors(block).items():
        assert torch.equal(tensor, before[name][KEPT])


def test_as_many_experts_as_there_are_change_nothing(block):
    before = tensors(block)
    done = dern(block, SCORE, 8, threshold=-1)
    assert torch.equal(done.transfer, torch.eye(8))
    assert (done.moved, done.cosine) == (0, 1)
    for name, tensor in tensors(block).items():
        assert torch.equal(tensor, before[name])


@settings(max_examples=15)
@given(st.floats(-1, 1), st.floats(-1, 1), st.integers(2, 8))
def test_a_lower_threshold_moves_no_fewer_neurons_and_no_neuron_moves_twice(one, other, keep):
    low, high = sorted((one, other))
    block = find_moe_blocks(tiny(hidden_size=8, moe_intermediate_size=6))[0]
    found = []
    for threshold in (low, high):
        with block.trial():
            found.append(dern(block, SCORE, keep, threshold=threshold))
    assert found[0].moved >= found[1].moved
    for done in found:
        assert bool((done.transfer.sum(0) <= 1 + 1e-6).all())
        assert torch.equal(done.transfer[:, done.kept], torch.eye(keep))


def test_numbering_of_experts_and_order_of_neurons_do_not_matter(model):
    block = find_moe_blocks(model)[0]
    x = torch.randn(1, 30, 32)
    order = torch.randperm(8).tolist()
    with torch.no_grad(), block.trial():
        dern(block, SCORE, 4, threshold=0.1)
        wanted = block.module(x)[0]
    block.permute(order)
    block.replace(range(8), reordered(block.experts[list(range(8))], torch.randperm(24)))
    dern(block, SCORE[order], 4, threshold=0.1)
    with torch.no_grad():
        torch.testing.assert_close(block.module(x)[0], wanted, rtol=1e-3, atol=1e-3)


def test_weights_decide_between_an_expert_and_its_noisy_copy(block):
    with_twins(block, noise=0.3)
    own = to_segments(block.experts)[1]
    distances = []
    for copy in (0.05, 0.4):
        score = torch.tensor([copy, 1.0, 0, 0.5, 0, 0.5, 0, 0.5])
        with block.trial():
            dern(block, score, 4)
            distances.append(float((to_segments(block.experts)[0] - own).norm()))
    with block.trial():
        dern(block, score, 4, weighted=False)
        distances.append(float((to_segments(block.experts)[0] - own).norm()))
    assert 0 < distances[0] < distances[1] < distances[2]


def test_gate_and_random_centres_are_other_ways_to_start(block):
    with_twins(block)
    found = {}
    for init in ("own", "gate", "random"):
        with block.trial():
            dern(block, SCORE, 4, init=init)
            found[init] = to_segments(block.experts)
    # the same neuron twice, for both twins are in the pool and have the same largest gate weight
    top = found["gate"][0]
    assert len(torch.unique(top.round(decimals=3), dim=0)) < 24
    assert not torch.allclose(found["own"], found["random"])
    with block.trial():
        dern(block, SCORE, 4, init="random", seed=0)
        assert torch.equal(to_segments(block.experts), found["random"])
    dern(block, SCORE, 4, init="random", seed=1)
    assert not torch.equal(to_segments(block.experts), found["random"])


def test_biases_move_with_their_neurons_and_that_of_down_is_averaged():
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    block = find_moe_blocks(GptOssForCausalLM(config).eval())[0]
    for tensor in vars(block.experts).values():
        tensor.normal_(std=0.5)
    for twin in (2, 3):
        block.replace([twin], reordered(block.experts[[twin - 2]], torch.randperm(8)))
        block.experts.down_bias[twin].normal_()
    before = block.experts[[0, 1, 2, 3]]
    dern(block, torch.tensor([0.4, 0.3, 0.1, 0.2]), 2)
    for name in ("up", "gate", "down", "up_bias", "gate_bias"):
        torch.testing.assert_close(getattr(block.experts, name), getattr(before, name)[:2], rtol=0, atol=1e-5)
    bias = before.down_bias
    wanted = torch.stack((0.8 * bias[0] + 0.2 * bias[2], 0.6 * bias[1] + 0.4 * bias[3]))
    torch.testing.assert_close(block.experts.down_bias, wanted)


def test_bfloat16_weights_are_compared_in_float32(model):
    block = find_moe_blocks(model.bfloat16())[0]
    exact = find_moe_blocks(tiny())[0]
    exact.replace(range(8), from_segments(to_segments(block.experts), exact.experts))
    with torch.no_grad():
        done, wanted = (dern(b, SCORE, 4, threshold=0.2) for b in (block, exact))
    assert torch.equal(done.transfer, wanted.transfer)
    assert block.experts.up.dtype == torch.bfloat16
    torch.testing.assert_close(block.experts.up, exact.experts.up.bfloat16())


def test_routing_groups_keep_equally_many_experts_and_share_neurons():
    block = find_moe_blocks(grouped())[0]
    block.router.selection_bias.copy_(torch.arange(8.0))
    done = dern(block, torch.arange(8.0), 4, threshold=-1)
    assert done.kept == [2, 3, 6, 7]
    assert block.router.selection_bias.tolist() == [2, 3, 6, 7]
    assert done.moved == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1}, "sends each token to 2; use 2 ≤ keep ≤ 8"),
        ({"keep": 9}, "use 2 ≤ keep ≤ 8"),
        ({"threshold": 1.5}, "threshold=1.5; it is a cosine"),
        ({"threshold": float("nan")}, "it is a cosine"),
        ({"init": "best"}, "no init 'best'; use own, gate or random"),
        ({"parts": ("up", "bias")}, "use some of gate, up, down"),
        ({"importance_E": torch.ones(7)}, "should be 8 numbers ≥ 0, one per expert"),
        ({"importance_E": -torch.ones(8)}, "should be 8 numbers ≥ 0"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_changes(block, options, message):
    before = tensors(block)
    with pytest.raises(ValueError, match=message):
        dern(block, **{"importance_E": SCORE, "keep": 4} | options)
    assert block.num_experts == 8
    for name, tensor in tensors(block).items():
        assert torch.equal(tensor, before[name])


def test_too_little_text_to_choose_by_is_said(block):
    score = torch.tensor([1.0, 0, 0, 0, 0, 0, 1, 0])
    with pytest.warns(UserWarning, match="6 of 8 experts have importance 0, more than are dropped"):
        done = dern(block, score, 4, threshold=-1)
    assert {0, 6} < set(done.kept)
    assert all(bool(t.isfinite().all()) for t in tensors(block).values())
