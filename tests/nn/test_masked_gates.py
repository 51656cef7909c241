import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.nn import ExpertHealth, FeatureGate, MaskedGates, NormalizedExperts

masks = (
    st.integers(1, 4)
    .flatmap(
        lambda experts: st.lists(
            st.lists(st.booleans(), min_size=experts, max_size=experts).filter(any), min_size=1, max_size=4
        )
    )
    .map(torch.tensor)
)


@given(masks)
def test_a_gate_shares_out_all_its_weight_among_the_experts_it_reaches(reach_GE):
    weights = MaskedGates(3, reach_GE)(torch.randn(5, 3))
    assert bool((weights[:, ~reach_GE] == 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, len(reach_GE)))


@given(masks)
def test_one_input_for_all_gates_is_the_same_as_that_input_for_each(reach_GE):
    gates, x = MaskedGates(3, reach_GE), torch.randn(5, 3)
    torch.testing.assert_close(gates(x), gates(x[:, None].expand(-1, len(reach_GE), -1)))


def test_weights_are_those_of_a_softmax_with_minus_infinity_where_a_gate_does_not_reach():
    reach = torch.tensor([[True, False, True], [True, True, True]])
    gates, x = MaskedGates(4, reach).double(), torch.randn(6, 2, 4, dtype=torch.float64)
    for g, pairs in enumerate(([0, 1], [2, 3, 4])):  # rows of the weight: reachable pairs in row-major order
        logits = torch.full((6, 3), -torch.inf, dtype=torch.float64)
        logits[:, reach[g]] = x[:, g] @ gates.weight[pairs].T + gates.bias[pairs]
        torch.testing.assert_close(gates(x)[:, g], logits.softmax(-1))


def test_a_lone_expert_gets_a_sigmoid_that_moves_with_the_input_and_learns():
    reach = torch.tensor([[True, False, False], [False, True, True]])
    x = torch.randn(50, 3)
    assert bool((MaskedGates(3, reach)(x)[:, 0, 0] == 1).all())
    gates = MaskedGates(3, reach, lone="sigmoid")
    weights = gates(x)
    assert weights[:, 0, 0].std() > 0.01
    torch.testing.assert_close(weights[:, 1].sum(-1), torch.ones(50))
    weights[:, 0].sum().backward()
    assert bool(gates.weight.grad.isfinite().all())
    assert gates.weight.grad[0].abs().sum() > 0


def test_a_gate_that_reaches_nothing_is_refused_by_number():
    with pytest.raises(ValueError, match=r"gates \[1\] reach no expert"):
        MaskedGates(3, torch.tensor([[True, False], [False, False]]))


def test_the_feature_gate_multiplies_its_input_and_starts_as_the_identity():
    gate, x = FeatureGate(6, (2, 3), num_gates=4), torch.randn(5, 6)
    torch.testing.assert_close(gate(x), x[:, None].expand(-1, 4, -1))
    for up in gate.up:
        up.data.normal_()
    factors = gate(x) / x[:, None]
    assert factors.min() > 0
    assert factors.max() < 2
    assert not torch.allclose(factors[:, 0], factors[:, 1])  # every bank has a view of its own
    assert bool((gate(torch.zeros(2, 6)) == 0).all())


def test_the_feature_gate_is_the_published_formula():
    gate, x = FeatureGate(3, (1, 2), num_gates=2).double(), torch.randn(4, 2, 3, dtype=torch.float64)
    for up in gate.up:
        up.data.normal_()
    for g in range(2):
        for t in range(4):
            v = x[t, g]
            shares = (v @ gate.mix[g] + gate.mix_bias[g, 0]).softmax(0)
            factor = sum(
                share * 2 * torch.sigmoid(v @ down[g] @ up[g])
                for share, down, up in zip(shares, gate.down, gate.up, strict=True)
            )
            torch.testing.assert_close(gate(x)[t, g], v * factor)
    with pytest.raises(ValueError, match="at least 1"):
        FeatureGate(3, ())


def test_normalised_experts_have_one_scale_and_few_zeros_whatever_their_weights_are():
    experts, x = NormalizedExperts(3, 8, 5), torch.randn(400, 8)
    experts.weight.data *= torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    outputs = experts(x)
    assert outputs.std((0, 2)).max() / outputs.std((0, 2)).min() < 1.3  # silu bends a little
    plain = NormalizedExperts(3, 8, 5, norm=False, activation="relu")
    plain.weight.data *= torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    assert (plain(x) == 0).double().mean() > 0.3


def test_every_expert_is_normalised_over_the_batch_with_its_own_statistics():
    experts = NormalizedExperts(2, 4, 3).double()
    x = torch.randn(9, 2, 4, dtype=torch.float64)
    outputs = experts(x)
    for e in range(2):
        z = x[:, e] @ experts.weight[e] + experts.bias[e]
        z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(outputs[:, e], z * z.sigmoid())
    experts.eval()
    torch.testing.assert_close(experts(x[:1]), experts(x)[:1])  # running statistics: no batch needed
    with pytest.raises(ValueError, match="more than 1 value"):
        experts.train()(x[:1])


def test_health_over_batches_is_health_of_the_whole():
    outputs, weights = torch.randn(20, 3, 4).relu(), torch.rand(20, 2, 3).softmax(-1)
    whole, parts = ExpertHealth(), ExpertHealth()
    whole.update(outputs, weights)
    parts.update(outputs[:7], weights[:7])
    parts.update(outputs[7:], weights[7:])
    for name in ("zero_fraction", "std", "gate_weight", "gate_share"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))
    torch.testing.assert_close(whole.zero_fraction, (outputs == 0).double().mean((0, 2)))
    torch.testing.assert_close(whole.std, outputs.double().var(0, unbiased=False).mean(1).sqrt())
    with pytest.raises(ValueError, match="batches before"):
        whole.update(outputs, weights[:, :1])
