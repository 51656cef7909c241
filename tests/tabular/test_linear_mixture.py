import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.tabular.growth import GrowingMixture
from coterie.tabular.linear_mixture import (
    LinearMixture,
    Mixed,
    add_expert,
    classification_loss,
    merge_experts,
    most_alike,
    remove_expert,
)


def mixture(experts=3, mix="prob", dim=4):
    model = LinearMixture(dim, experts, mix)
    return model, torch.randn(50, dim).double(), torch.optim.Adam(model.parameters())


@given(st.sampled_from(["prob", "logit"]), st.integers(1, 4), st.integers(0, 2**16))
def test_both_mixtures_and_losses_are_their_formulas(mix, experts, seed):
    torch.manual_seed(seed)
    model, x, _ = mixture(experts, mix)
    y = (torch.rand(50) < 0.5).double()
    mixed = model(x)
    gate, scores = mixed.routing.weights, mixed.scores_TE
    p = (gate * scores.sigmoid()).sum(1) if mix == "prob" else (gate * scores).sum(1).sigmoid()
    torch.testing.assert_close(mixed.log_odds_T.sigmoid(), p)
    each = -(y[:, None] * scores.sigmoid().log() + (1 - y[:, None]) * (-scores).sigmoid().log())
    whole = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    torch.testing.assert_close(classification_loss(mixed, y, localized=False), whole)
    torch.testing.assert_close(classification_loss(mixed, y, localized=True), (gate * each).sum(1).mean())


def test_certain_experts_give_finite_log_odds():
    model, x, _ = mixture()
    model.experts.weight.data *= 1e4
    assert bool(model(x).log_odds_T.isfinite().all())


def test_a_new_expert_has_its_share_and_the_old_ones_keep_their_proportions():
    model, x, optimizer = mixture()
    before = model.router(x).weights.detach()
    add_expert(model, x, torch.zeros(4).double(), 0.0, optimizer)
    after = model.router(x).weights.detach()
    assert float(after[:, 3].mean()) == pytest.approx(1 / 4, abs=1e-9)
    torch.testing.assert_close(after[:, :3] / after[:, :3].sum(1, keepdim=True), before)
    remove_expert(model, 3, optimizer)
    torch.testing.assert_close(model.router(x).weights, before)


def test_merging_twins_changes_no_prediction():
    model, x, optimizer = mixture(3)
    with torch.no_grad():
        for bank in model.banks:
            for parameter in bank.parameters():
                parameter[2] = parameter[0]
    assert most_alike(model) == ((0, 2), pytest.approx(1.0))
    before = model(x).log_odds_T.detach()
    merge_experts(model, (0, 2), x, optimizer)
    assert model.num_experts == 2
    torch.testing.assert_close(model(x).log_odds_T.detach(), before)


def test_merging_unlike_experts_keeps_what_they_have_together():
    model, x, optimizer = mixture(4)
    together = float(model.router(x).weights[:, [1, 2]].sum(1).mean())
    merge_experts(model, (1, 2), x, optimizer)
    assert float(model.router(x).weights[:, 1].mean()) == pytest.approx(together, abs=1e-9)


def growing(experts=2):
    made = GrowingMixture(4, experts, "prob", learning_rate=0.05, seed=3)
    x = torch.randn(60, 4).double()
    return made, x, (x[:, 0] > 0).double()


def train(made, x, y, steps=5, only_newest=False):
    def loss(mixed: Mixed):
        return classification_loss(mixed, y, localized=False)

    made.train(x, loss, steps=steps, l2=1e-4, only_newest=only_newest)
    made.remember(x)


def test_only_the_newest_expert_and_the_gate_learn_when_asked():
    made, x, y = growing(3)
    train(made, x, y)
    gate, experts = made.model.banks
    old, gates = experts.weight.detach().clone(), gate.weight.detach().clone()
    train(made, x, y, only_newest=True)
    assert experts.weight[:2].tolist() == old[:2].tolist()
    assert experts.weight[2].tolist() != old[2].tolist()
    assert (gate.weight != gates).all()


def test_at_the_limit_the_least_used_of_three_chunks_goes():
    made, x, y = growing(3)
    made.shares = [[0.1, 0.8, 0.1], [0.5, 0.2, 0.3], [0.2, 0.6, 0.2]]
    weight = made.model.experts.weight.detach().clone()
    done = made.grow(x, max_experts=3, merge_above=None, start=made.small_expert())
    assert done == {"merged": [], "removed": 2}
    assert made.model.experts.weight[:2].tolist() == weight[:2].tolist()
    assert made.shares == [[0.1, 0.8, None], [0.5, 0.2, None], [0.2, 0.6, None]]
    train(made, x, y)
    assert made.least_used() in range(3)


def test_twins_make_room_so_that_none_has_to_go():
    made, x, _ = growing(3)
    made.model.experts.weight.data[1] = made.model.experts.weight.data[0]
    made.shares = [[0.2, 0.3, 0.5]]
    done = made.grow(x, max_experts=3, merge_above=0.99, start=made.small_expert())
    assert done == {"merged": [[0, 1]], "removed": None}
    assert made.shares == [[0.5, 0.5, None]]


def test_training_that_is_saved_and_loaded_goes_on_bit_for_bit():
    made, x, y = growing()
    train(made, x, y)
    other = GrowingMixture(4, 2, "prob", learning_rate=0.05, seed=8)
    other.load_tensors({name: tensor.clone() for name, tensor in made.tensors().items()})
    for each in (made, other):
        train(each, x, y)
    assert other.model.experts.weight.tolist() == made.model.experts.weight.tolist()


def test_torchs_own_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3).tolist()
    torch.manual_seed(5)
    made, *_ = GrowingMixture(4, 2, "prob", learning_rate=0.05, seed=1), 0
    made.small_expert()
    assert torch.rand(3).tolist() == expected
