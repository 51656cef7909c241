"""Statistics say what the block does with an expert; the allocation is the published one."""

import itertools
import math

import pytest
import torch

from coterie.hf import find_moe_blocks
from coterie.reproduce.mc_sharp import PUBLISHED
from coterie.shrink import (
    ExpertStatistics,
    allocate_bits,
    allocate_model_bits,
    block_inputs,
    expert_statistics,
    routed_tokens,
    rtn,
)

IDS = torch.randint(257, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def block_and_inputs(model):
    block = find_moe_blocks(model)[1]
    return block, block_inputs(model, block, [IDS])


@torch.no_grad()
def output(block, inputs_TD):
    return block.module(inputs_TD.unsqueeze(0)).double()


@pytest.mark.parametrize("layer", PUBLISHED)
def test_mixtral_gets_the_bits_that_its_authors_published(layer):
    counts, weights, errors, shipped = PUBLISHED[layer]
    given = ExpertStatistics(layer, torch.tensor(counts), torch.tensor(weights), torch.tensor(errors))
    for budget, bits in shipped.items():
        assert allocate_bits(given, budget / 8) == list(bits)


def test_the_error_has_an_exponent_of_its_own():
    counts, weights, errors, shipped = PUBLISHED["layer 15"]
    given = ExpertStatistics("15", torch.tensor(counts), torch.tensor(weights), torch.tensor(errors))
    assert allocate_bits(given, 2, gamma=3.0) != list(shipped[16])
    assert allocate_bits(given, 2, alpha=0, beta=0) != list(shipped[16])


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_error_is_what_the_output_of_the_block_changes_by(block_and_inputs, bits):
    block, inputs_TD = block_and_inputs
    found = expert_statistics(block, inputs_TD, group_size=32)
    before = output(block, inputs_TD)
    for e in (0, 5):
        kept = block.experts[[e]]
        for name in ("gate", "up", "down"):
            matrix = getattr(block.experts, name)
            matrix[e] = rtn(matrix[e], bits, group_size=32).dequantize()
        change = (output(block, inputs_TD) - before).norm()
        block.replace([e], kept)
        assert change > 0
        assert found.error[e, found.bits.index(bits)].item() == pytest.approx(change.item(), rel=1e-4)


def test_statistics_leave_the_block_as_it_was(block_and_inputs):
    block, inputs_TD = block_and_inputs
    before = {name: t.clone() for name, t in block.module.state_dict().items()}
    expert_statistics(block, inputs_TD)
    assert all(torch.equal(t, before[name]) for name, t in block.module.state_dict().items())


def test_the_weight_is_the_softmax_before_renormalisation(block_and_inputs):
    block, inputs_TD = block_and_inputs
    found = expert_statistics(block, inputs_TD)
    count, weight = [0.0] * 8, [0.0] * 8
    for x in inputs_TD.double():
        score = (block.router.rows.double() @ x).softmax(0)
        for e in score.topk(2).indices.tolist():
            count[e] += 1 / len(inputs_TD)
            weight[e] += score[e].item() / len(inputs_TD)
    assert found.frequency.tolist() == pytest.approx(count)
    assert found.weight.tolist() == pytest.approx(weight, rel=1e-4)
    assert sum(weight) < 0.99  # renormalised, it would be 1


def test_frequencies_sum_to_top_k_even_for_one_token(block_and_inputs):
    block, inputs_TD = block_and_inputs
    assert expert_statistics(block, inputs_TD[:1]).frequency.sum() == 2
    assert routed_tokens(block, inputs_TD[:1]).experts_TK.shape == (1, 2)


def test_an_expert_that_no_token_reached_is_warned_of_and_gets_one_bit():
    frequency, weight = torch.tensor([0.7, 0.7, 0.0, 0.6]), torch.tensor([0.5, 0.3, 0.0, 0.1])
    given = ExpertStatistics("mlp", frequency, weight, torch.tensor([[9.0, 4, 1]] * 4), tokens=100)
    with pytest.warns(UserWarning, match=r"mlp: no calibration token reached experts \[2\]; they get 1 bit"):
        bits = allocate_bits(given, 2.0)
    assert bits[2] == 1


@pytest.mark.parametrize("average", [0, 1, 1.37, 3.2, 100, math.nan, math.inf])
def test_a_budget_that_cannot_be_met_is_refused(average):
    given = ExpertStatistics("mlp", torch.ones(8), torch.ones(8), torch.ones(8, 3))
    with pytest.raises(ValueError, match=r"bit budget .* infeasible: mlp has 8 experts .* use 1.375 … 3"):
        allocate_bits(given, average)


@pytest.mark.parametrize("average", [1.375, 2, 2.05, 2.4, 3])
def test_every_budget_in_between_is_met(average):
    error = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)).sort(1, descending=True).values
    bits = allocate_bits(ExpertStatistics("mlp", torch.ones(8), torch.ones(8), error), average)
    assert sum(bits) <= 8 * average
    assert {1, 2, 3} & set(bits) >= {2, 3}


def test_inputs_end_at_the_block_and_are_what_it_reads(model):
    blocks = find_moe_blocks(model)
    seen = []
    handle = blocks[1].module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    # batches of another size add in another order
    torch.testing.assert_close(block_inputs(model, blocks[1], [IDS[:2], IDS[2:]]), seen[0].flatten(0, 1))


def test_bad_calibration_is_named(model):
    block = find_moe_blocks(model)[1]
    with pytest.raises(ValueError, match=r"model.layers.1.mlp: no calibration text"):
        block_inputs(model, block, [])
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp: 4 of 4 of its inputs are not finite"):
        block_inputs(model, block, [torch.tensor([[1, 2, 5, 3]])])


def some_statistics(seed, sizes=(4, 3), scales=(1.0, 5.0)):
    draw = torch.Generator().manual_seed(seed)
    return [
        ExpertStatistics(
            f"layer {i}",
            torch.rand(size, generator=draw) + 0.1,
            torch.rand(size, generator=draw) + 0.1,
            scale * torch.rand(size, 3, generator=draw).sort(1, descending=True).values,
        )
        for i, (size, scale) in enumerate(zip(sizes, scales, strict=True))
    ]


def total_cost(statistics, plan):
    """Σ frequency · weight^1.5 · error, frequencies and weights as shares of their block's."""
    total = 0.0
    for one, widths in zip(statistics, plan, strict=True):
        for e, width in enumerate(widths):
            share = one.frequency[e].item() / one.frequency.sum().item()
            weight = one.weight[e].item() / one.weight.sum().item()
            total += share * weight**1.5 * one.error[e, width - 1].item()
    return total


@pytest.mark.parametrize("average", [1.5, 2.0, 2.6])
@pytest.mark.parametrize("seed", range(3))
def test_no_bits_within_the_budget_of_the_model_cost_less(seed, average):
    statistics = some_statistics(seed)
    plan = allocate_model_bits(statistics, average)
    best = min(
        total_cost(statistics, (bits[:4], bits[4:]))
        for bits in itertools.product((1, 2, 3), repeat=7)
        if sum(bits) <= 7 * average and {2, 3} <= set(bits)
    )
    assert [len(bits) for bits in plan] == [4, 3]
    assert total_cost(statistics, plan) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_one_program_for_the_model_costs_at_most_what_one_per_block_does(seed):
    statistics = some_statistics(seed, sizes=(8, 8, 8), scales=(1.0, 4.0, 16.0))
    blocks = [allocate_bits(one, 2.0) for one in statistics]
    model = allocate_model_bits(statistics, 2.0)
    assert sum(map(sum, model)) <= 2 * 24
    assert total_cost(statistics, model) < total_cost(statistics, blocks)
    assert sum(model[0]) < sum(model[2])  # bits went where errors are large


def test_of_one_block_the_model_program_is_the_block_program():
    (one,) = some_statistics(0, sizes=(8,), scales=(1.0,))
    assert allocate_model_bits([one], 2.05) == [allocate_bits(one, 2.05)]
    exponents = {"alpha": 0, "beta": 0, "gamma": 2}
    assert allocate_model_bits([one], 2.05, **exponents) == [allocate_bits(one, 2.05, **exponents)]


@pytest.mark.parametrize("seed", range(5))
def test_block_order_changes_no_block_s_bits(seed):
    statistics = some_statistics(seed, sizes=(6, 5, 4), scales=(1.0, 2.0, 3.0))
    plan = allocate_model_bits(statistics, 2.0)
    assert allocate_model_bits(statistics[::-1], 2.0) == plan[::-1]


def test_the_budget_of_a_model_may_be_lower_than_that_of_each_block():
    statistics = some_statistics(0, sizes=(8, 8), scales=(1.0, 1.0))
    assert sum(map(sum, allocate_model_bits(statistics, 19 / 16))) == 19  # 14 in 1 bit, one in 2, one in 3
    with pytest.raises(ValueError, match=r"infeasible: layer 0 has 8 experts .* use 1.375 … 3"):
        allocate_bits(statistics[0], 19 / 16)
    with pytest.raises(ValueError, match=r"infeasible: the model has 16 experts .* use 1.188 … 3"):
        allocate_model_bits(statistics, 18 / 16)


def test_statistics_that_do_not_fit_each_other_are_named():
    first, second = some_statistics(0)
    second.bits = (2, 3, 4)
    with pytest.raises(ValueError, match=r"layer 1 was measured in \(2, 3, 4\) bits, layer 0 in \(1, 2, 3\)"):
        allocate_model_bits([first, second], 2.0)
    with pytest.raises(ValueError, match="there are no statistics"):
        allocate_model_bits([], 2.0)


def test_an_unreached_expert_is_warned_of_in_the_model_s_program_too():
    first, second = some_statistics(0)
    second.frequency[1] = second.weight[1] = 0
    with pytest.warns(UserWarning, match=r"layer 1: no calibration token reached experts \[1\]"):
        assert allocate_model_bits([first, second], 2.4)[1][1] == 1
