import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.nn import (
    GroupAttention,
    GroupAttentionExperts,
    LinearScore,
    MaskExperts,
    MLPExperts,
    MoE,
    Router,
    TopK,
)

F64 = torch.float64


def by_loops(attention, h, active):
    """h + softmax(q·k / √F) v, one expert after the other."""
    out = h.clone()
    tokens, groups, members, width = h.shape
    for t in range(tokens):
        for g in range(groups):
            there = [m for m in range(members) if active[t, g, m]]
            for m in there:
                q = attention.query.weight @ h[t, g, m]
                scores = torch.stack([q @ (attention.key.weight @ h[t, g, n]) for n in there])
                a = (scores * width**-0.5).softmax(0)
                read = [a[i] * (attention.value.weight @ h[t, g, n]) for i, n in enumerate(there)]
                out[t, g, m] += torch.stack(read).sum(0)
    return out


@given(groups=st.integers(1, 3), members=st.integers(1, 4), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_group_attention_is_the_plain_loop(groups, members, share):
    attention = GroupAttention(5, groups).to(F64)
    h = torch.randn(4, groups, members, 5, dtype=F64)
    active = torch.rand(4, groups, members) < share
    torch.testing.assert_close(attention(h, active), by_loops(attention, h, active))


def test_a_group_of_one_adds_its_own_values_and_nothing_else():
    attention, h = GroupAttention(5, 3).to(F64), torch.randn(4, 3, 1, 5, dtype=F64)
    everyone = torch.ones(4, 3, 1, dtype=torch.bool)
    torch.testing.assert_close(attention(h, everyone), h + h @ attention.value.weight.T)


def test_experts_of_other_groups_and_inactive_ones_are_never_read():
    attention = GroupAttention(5, 2)
    h, active = torch.randn(6, 2, 3, 5), torch.tensor([[True, False, True], [True, True, False]])
    active = active.expand(6, 2, 3)
    changed = h.clone()
    changed[:, 0, 1] = 100.0  # inactive, in the first group
    changed[:, 1] = -100.0  # the other group
    before, after = attention(h, active), attention(changed, active)
    assert torch.equal(before[:, 0, [0, 2]], after[:, 0, [0, 2]])
    assert torch.equal(attention(h, torch.zeros_like(active)), h)


@given(seed=st.integers(0, 5))
def test_with_silent_values_the_bank_is_the_plain_bank(seed):
    torch.manual_seed(seed)
    bank = GroupAttentionExperts(6, 4, 5, num_groups=2, dim_out=3).to(F64)
    plain = MLPExperts(6, 4, 5, dim_out=3, activation="relu").to(F64)
    left_out = plain.load_state_dict(bank.state_dict(), strict=False).unexpected_keys
    assert all(name.startswith("attention.") for name in left_out)
    torch.nn.init.zeros_(bank.attention.value.weight)
    routing = Router(LinearScore(4, 6), TopK(2)).to(F64)(x := torch.randn(7, 4, dtype=F64))
    torch.testing.assert_close(bank(x, routing), plain(x, routing))


def test_members_of_a_group_can_be_relabelled_and_whole_groups_too():
    bank = GroupAttentionExperts(4, 5, 6, num_groups=2, dim_out=2).to(F64)
    router = Router(LinearScore(5, 4), TopK(3)).to(F64)
    x = torch.randn(9, 5, dtype=F64)
    before, _ = MoE(router, bank)(x)
    for order in ([1, 0, 2, 3], [2, 3, 0, 1]):
        relabelled = {n: p if "attention" in n else p[order] for n, p in bank.state_dict().items()}
        moved = GroupAttentionExperts(4, 5, 6, num_groups=2, dim_out=2).to(F64)
        moved.load_state_dict(relabelled)
        other = Router(LinearScore(5, 4), TopK(3)).to(F64)
        other.score.load_state_dict({"weight": router.score.weight[order]})
        torch.testing.assert_close(MoE(other, moved)(x)[0], before)


def test_an_expert_that_no_token_uses_gets_no_gradient():
    bank = GroupAttentionExperts(4, 5, 6, num_groups=2, dim_out=1)
    router = Router(MaskExperts(LinearScore(5, 4), torch.arange(4) < 2), TopK(2))
    y, routing = MoE(router, bank)(torch.randn(9, 5))
    y.square().sum().backward()
    assert routing.load.tolist() == [9, 9, 0, 0]
    assert float(bank.up_proj.grad[2:].abs().sum()) == 0
    assert float(bank.up_proj.grad[:2].abs().sum()) > 0
    assert float(bank.attention.query.weight.grad.abs().sum()) > 0


def test_no_tokens_give_no_results():
    moe = MoE(Router(LinearScore(5, 4), TopK(2)), GroupAttentionExperts(4, 5, 6, num_groups=2, dim_out=1))
    assert moe(torch.zeros(0, 5))[0].shape == (0, 1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_groups=3 does not divide 8 experts"):
        GroupAttentionExperts(8, 4, 4, num_groups=3)
    attention = GroupAttention(5, 2)
    with pytest.raises(ValueError, match=r"should be \[T, 2, M, 5\]"):
        attention(torch.zeros(4, 3, 2, 5), torch.ones(4, 3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"active has shape \(4, 2\)"):
        attention(torch.zeros(4, 2, 2, 5), torch.ones(4, 2, dtype=torch.bool))
