"""Affinity of experts to a text."""

import pytest
import torch
from tiny_moe import two_texts

from coterie.hf import find_moe_blocks, recording
from coterie.tune import Affinity, Batch, Target, attribute_experts


def padded(*rows):
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    present = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return Batch(ids, present_BS=present)


def test_affinity_is_what_a_plain_loop_computes(model):
    rows = [[5, 6, 7, 8, 9, 10], [20, 21], [30, 31, 32]]
    found = attribute_experts(model, [padded(*rows[:2]), padded(rows[2])])
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for row in rows:
        with recording(find_moe_blocks(model)) as records, torch.no_grad():
            model(input_ids=torch.tensor([row]))
        for layer, record in enumerate(records):
            for experts, weights in zip(record.experts.tolist(), record.weights.tolist(), strict=True):
                for expert, weight in zip(experts, weights, strict=True):
                    expected[layer, expert] += weight / len(row) / len(rows)
    torch.testing.assert_close(found.scores_LE, expected, rtol=1e-5, atol=1e-7)


def test_padding_changes_nothing(model):
    rows = [[5, 6, 7, 8, 9, 10], [20, 21]]
    alone = attribute_experts(model, [padded(row) for row in rows])
    together = attribute_experts(model, [padded(*rows)])
    torch.testing.assert_close(together.scores_LE, alone.scores_LE, rtol=1e-5, atol=1e-7)


def test_long_sequences_do_not_outvote_short_ones(model):
    short, long = [7, 8], [9, 10, 11, 12, 13, 14, 15, 16]
    one, other = (attribute_experts(model, [padded(row)]).scores_LE for row in (short, long))
    both = attribute_experts(model, [padded(short, long)]).scores_LE
    torch.testing.assert_close(both, (one + other) / 2, rtol=1e-5, atol=1e-7)


def test_gate_mass_decides_not_the_count_of_tokens():
    # expert 1 is chosen by every token, with little weight; expert 0 by most, with much
    from coterie.nn import Routing

    weights = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.8, 0.2]])
    experts = torch.tensor([[0, 1], [0, 1], [2, 1]])
    routing = Routing(experts, weights, torch.zeros(3, 3), torch.zeros(3, 3), 3)
    mass = Affinity(routing.weights_TE.mean(0, keepdim=True), ["mlp"])
    assert int(routing.load.argmax()) == 1
    assert mass.top() == [Target(0, 0)]


def test_the_rank_is_over_all_layers_or_within_one():
    found = Affinity(torch.tensor([[0.3, 0.1], [0.2, 0.5]]), ["a", "b"])
    assert found.top(2) == [Target(1, 1), Target(0, 0)]
    assert found.top(2, within_layer=0) == [Target(0, 0), Target(0, 1)]
    assert found[Target(1, 0)] == pytest.approx(0.2)


def test_a_near_tie_warns_with_both_names():
    near = Affinity(torch.tensor([[0.30, 0.29]]), ["mlp"])
    with pytest.warns(UserWarning, match=r"expert 1 of mlp has an affinity of 0\.290, nearly as much as"):
        near.top()


def test_a_clear_lead_does_not_warn(recwarn):
    Affinity(torch.tensor([[0.30, 0.2]]), ["mlp"]).top()
    assert not recwarn


def test_shared_experts_are_no_targets():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"vocab_size": 257, "hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 4}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"shared_expert_intermediate_size": 8, "intermediate_size": 8, "num_experts_per_tok": 2}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes)).eval()
    assert find_moe_blocks(model)[0].shared is not None
    assert attribute_experts(model, [Batch(two_texts()[0])]).scores_LE.shape == (1, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: attribute_experts(m, []), "no text was given"),
        (
            lambda m: attribute_experts(
                m, [Batch(torch.ones(2, 3).long(), present_BS=torch.tensor([[True] * 3, [False] * 3]))]
            ),
            "all padding",
        ),
        (lambda m: Affinity(torch.ones(1, 2), ["mlp"]).top(3), "3 experts were asked for, of 2"),
        (lambda m: Batch(torch.ones(2, 1).long()), "no token to predict"),
        (lambda m: Batch(torch.ones(2, 3).long(), scored_BS=torch.ones(2, 3)), "scored_BS is torch.float32"),
    ],
)
def test_what_cannot_be_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
