import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routings import routings

from coterie.nn import LinearScore, Monitor, NoisyTopK, Router, Routing, TopK, balance, fluctuation


@given(routings(masked=True))
def test_load_balance_is_what_a_plain_loop_computes(routing):
    kept = routing.mask.tolist()
    tokens, slots = max(sum(kept), 1), max(int(routing.load.sum()), 1)
    expected = sum(
        routing.load[e].item() / slots
        * sum(routing.scores[t, e].item() for t in range(len(kept)) if kept[t]) / tokens
        for e in range(routing.num_experts)
    )  # fmt: skip
    assert balance.load_balance(routing).item() == pytest.approx(routing.num_experts * expected)


@given(routings(masked=True))
def test_a_factor_per_expert_weighs_each_experts_term(routing):
    factors = torch.linspace(0.1, 2, routing.num_experts, dtype=torch.float64)
    terms = []
    for e in range(routing.num_experts):
        only = torch.zeros(routing.num_experts, dtype=torch.float64)
        only[e] = 1
        terms.append(balance.load_balance(routing, expert_weights=only))
    weighted = balance.load_balance(routing, expert_weights=factors)
    torch.testing.assert_close(weighted, (factors * torch.stack(terms)).sum())
    torch.testing.assert_close(balance.load_balance(routing), torch.stack(terms).sum())
    torch.testing.assert_close(balance.load_balance([routing, routing], expert_weights=factors), weighted)


def test_experts_with_a_smaller_factor_end_up_with_more_load():
    logits = torch.zeros(4, requires_grad=True)
    noise, factors = torch.randn(2000, 4), torch.tensor([1.0, 1.0, 0.3, 0.3])
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(100):
        routing = TopK(1)(logits + noise)
        optimizer.zero_grad()
        balance.load_balance(routing, expert_weights=factors).backward()
        optimizer.step()
    assert routing.load[2:].sum().item() > 2 * routing.load[:2].sum().item()


def test_factors_for_other_experts_are_refused():
    with pytest.raises(ValueError, match=r"expert_weights has shape \(3,\); give one factor for each of 4"):
        balance.load_balance(TopK(1)(torch.randn(5, 4)), expert_weights=torch.ones(3))


def test_slots_dropped_over_capacity_still_count_as_load_in_the_balance_loss():
    routing = TopK(1)(torch.tensor([[1.0, 0.0]]).expand(8, 2))
    kept = routing.drop_over_capacity(0.5)
    assert int(kept.load.sum()) == 2
    torch.testing.assert_close(balance.load_balance(kept), balance.load_balance(routing))


def test_load_balance_is_transformers_loss_over_k():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    routing = Router(LinearScore(8, 4), TopK(2))(torch.randn(20, 8))
    theirs = load_balancing_loss_func((routing.logits,), num_experts=4, top_k=2)
    torch.testing.assert_close(balance.load_balance(routing), theirs / 2)


def test_load_balance_is_one_when_balanced_and_e_when_collapsed():
    logits = torch.full((8, 4), -1e4)
    balanced, collapsed = logits.clone(), logits.clone()
    balanced[torch.arange(8), torch.arange(8) % 4] = 0
    collapsed[:, 0] = 0
    assert balance.load_balance(TopK(1)(balanced)).item() == pytest.approx(1)
    assert balance.load_balance(TopK(1)(collapsed)).item() == pytest.approx(4)


@given(routings(masked=True))
def test_padding_changes_no_loss_and_no_statistic(routing):
    if not bool(routing.mask.any()) or int(routing.load.sum()) == 0:
        return
    m = routing.mask
    alone = Routing(
        routing.experts[m], routing.weights[m], routing.scores[m], routing.logits[m], routing.num_experts
    )
    for loss in (balance.load_balance, balance.router_z, balance.entropy, balance.importance_cv2):
        torch.testing.assert_close(loss(routing), loss(alone))
    one, two = Monitor(), Monitor()
    one.update(routing)
    two.update(alone)
    assert one.summary() == pytest.approx(two.summary())


def test_losses_are_means_over_layers_and_have_the_gradient_of_their_formula():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    for loss in (balance.load_balance, balance.router_z, balance.entropy, balance.importance_cv2):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(TopK(2)(x)), logits)
    a, b = TopK(2)(torch.randn(6, 4)), TopK(2)(torch.randn(6, 4))
    torch.testing.assert_close(balance.entropy([a, b]), (balance.entropy(a) + balance.entropy(b)) / 2)


def test_entropy_and_z_loss_of_an_undecided_router():
    routing = Routing.dense(torch.full((3, 4), 0.25), torch.zeros(3, 4))
    assert balance.entropy(routing).item() == pytest.approx(math.log(4))
    assert balance.router_z(routing).item() == pytest.approx(math.log(4) ** 2)


def test_load_cv2_has_a_gradient_and_needs_noisy_top_k():
    router = NoisyTopK(8, 4, k=2)
    balance.load_cv2(router(torch.randn(32, 8))).backward()
    assert float(router.weight.grad.abs().sum()) > 0
    with pytest.raises(ValueError, match="route with NoisyTopK in training mode"):
        balance.load_cv2(router.eval()(torch.randn(2, 8)))


def test_a_loss_of_no_routings_is_refused():
    with pytest.raises(ValueError, match="a dense model has no balance to keep"):
        balance.load_balance([])


def test_loss_free_update_balances_a_skewed_router():
    torch.manual_seed(0)
    select = TopK(1, gate="sigmoid", bias=torch.zeros(4))
    logits = torch.randn(400, 4) + torch.tensor([2.0, 0.0, 0.0, -2.0])
    before = select(logits).load.max().item()
    for _ in range(500):
        balance.loss_free_update(select.bias, select(logits).load, rate=5e-3)
    assert before > 250
    assert select(logits).load.max().item() < 115


@given(routings(masked=True), routings(masked=True))
def test_a_monitor_sums_over_updates(one, two):
    monitor = Monitor()
    monitor.update([one])
    if one.num_experts != two.num_experts:
        with pytest.raises(ValueError, match="this monitor has seen layers of"):
            monitor.update([two])
        return
    monitor.update([two])
    assert monitor.load[0].tolist() == (one.load + two.load).tolist()
    together = one.used_TE.double().t() @ one.used_TE.double()
    together += two.used_TE.double().t() @ two.used_TE.double()
    assert monitor.co_activation[0].tolist() == together.tolist()
    tokens = max(1, int(one.mask.sum() + two.mask.sum()))
    assert monitor.experts_per_token[0].item() == pytest.approx(monitor.load.sum().item() / tokens)


def test_a_monitor_reports_drops_and_starts_empty():
    monitor = Monitor()
    assert monitor.summary() == {}
    monitor.update(Routing.dense(torch.rand(4, 2)).drop_over_capacity(0.5))
    assert monitor.drop_rate.item() == pytest.approx(0.5)
    assert monitor.summary()["imbalance"] == pytest.approx(1)
    monitor.reset()
    assert monitor.summary() == {}


def test_fluctuation_is_the_share_of_tokens_that_moved():
    a = TopK(1)(torch.eye(4))
    b = TopK(1)(torch.eye(4)[[0, 1, 3, 2]])
    assert fluctuation(a, a) == 0
    assert fluctuation(a, b) == 0.5
    with pytest.raises(ValueError, match="of the same tokens and experts"):
        fluctuation(a, TopK(1)(torch.eye(5)))


@given(routings(masked=True), st.data())
def test_the_anchor_is_what_a_plain_loop_computes(routing, data):
    e = routing.num_experts
    experts = data.draw(st.lists(st.integers(0, e - 1), min_size=1, max_size=e, unique=True))
    on = data.draw(st.sampled_from(["topk", "softmax"]))
    kept = [t for t, real in enumerate(routing.mask.tolist()) if real]
    total = 0.0
    for t in kept:
        for i in range(e):
            seen = on == "softmax" or i in routing.experts[t].tolist() or i in experts
            gate = routing.scores[t, i].item() if seen else 0.0
            total += (gate - (1 / len(experts) if i in experts else 0.0)) ** 2
    found = balance.router_anchor(routing, experts, on=on).item()
    assert found == pytest.approx(total / max(len(kept), 1))


@pytest.mark.parametrize("on", ["topk", "softmax"])
def test_the_anchor_pulls_back_tokens_that_have_left_the_expert(on):
    router = Router(LinearScore(4, 8), TopK(2))
    x = torch.rand(64, 4)  # on one side of the origin, where one expert can be best for all
    gone = (~router(x).used_TE[:, 5]).nonzero().flatten()
    assert len(gone) > 10
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        balance.router_anchor(router(x[gone]), [5], on=on).backward()
        optimizer.step()
    assert router(x[gone]).used_TE[:, 5].float().mean() > 0.8


def test_the_anchor_pulls_only_the_tokens_it_is_given():
    routing = Routing.dense(torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]))
    first = torch.tensor([True, False, False])
    assert balance.router_anchor(routing, [0], tokens_T=first).item() == 0.5
    assert balance.router_anchor([routing, routing], [0]).item() == pytest.approx((0.5 + 0 + 2) / 3)
    with pytest.raises(ValueError, match=r"experts=\[2\]; give at least one, each in 0 … 1"):
        balance.router_anchor(routing, [2])
    with pytest.raises(ValueError, match='on=\'sigmoid\'; use "topk" or "softmax"'):
        balance.router_anchor(routing, [0], on="sigmoid")
