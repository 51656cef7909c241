import math

import pytest
import torch
from torch import nn

from coterie.language.comet_trees import make_ffn, permutation_loss, routing_loss
from coterie.models import Decoder, DecoderConfig
from coterie.nn import (
    LearnedPermutation,
    Monitor,
    PermuteLabels,
    TreeRouter,
    TreeScore,
    permutation_entropy,
)
from coterie.train import LossOutput, PermutationSearch, fit

CONFIG = DecoderConfig(
    17, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, hidden=16, num_experts=6, top_k=2, expert_hidden=8
)


def loss_of(weight):
    def loss(model, ids):
        logits, routings = model(ids[:, :-1])
        error = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        total = error + routing_loss(routings, weight=weight) + permutation_loss(model)
        return LossOutput(total, error.detach(), ids[:, 1:].numel(), routings)

    return loss


def text():
    """Sequences in which every token is followed by one and the same other."""
    start = torch.arange(17).repeat(4)
    return torch.stack([(start * 3**i) % 17 for i in range(13)], 1)


@pytest.mark.parametrize("local_search", [False, True])
def test_the_router_trains_inside_the_reference_decoder(local_search):
    torch.manual_seed(0)
    model = Decoder(CONFIG, make_ffn(CONFIG, local_search=local_search))
    callbacks = [PermutationSearch(8)] if local_search else []
    settings = {"steps": 60, "batch_size": 17, "lr": 1e-2, "progress": False, "callbacks": callbacks}
    history = fit(model, text(), loss=loss_of(0.1), **settings)
    assert history.cross_entropy[-1] < 0.3 * history.cross_entropy[0]
    with torch.no_grad():
        _, routings = model.eval()(text()[:, :-1])
    monitor = Monitor()
    monitor.update([routing.validate() for routing in routings])
    assert bool((monitor.experts_per_token < 4).all())  # 6 at the start
    learned = [module for module in model.modules() if isinstance(module, LearnedPermutation)]
    assert [bool(permutation.hard) for permutation in learned] == [True, True] * local_search
    assert float(permutation_loss(model)) == 0


def test_trees_begin_undecided_in_the_decoder_too():
    _, routings = Decoder(CONFIG, make_ffn(CONFIG))(torch.randint(17, (3, 9)))
    for routing in routings:
        assert float(routing.paths.min()) > 0.03
        assert routing.slots_per_token.unique().tolist() == [6]
    for module in Decoder(CONFIG, make_ffn(CONFIG, local_search=True)).modules():
        if isinstance(module, LearnedPermutation):
            assert float(module.logits.abs().max()) <= 0.05


def test_more_entropy_loss_leaves_fewer_experts():
    used = {}
    for weight in (0.0, 0.3):
        torch.manual_seed(0)
        model = Decoder(CONFIG, make_ffn(CONFIG))
        fit(model, text(), loss=loss_of(weight), steps=40, batch_size=17, lr=1e-2, progress=False)
        _, routings = model.eval()(text()[:, :-1])
        used[weight] = torch.stack([r.slots_per_token for r in routings]).double().mean().item()
    assert used[0.3] < used[0.0] - 0.5


def test_the_losses_are_the_papers_formulas():
    routers = [PermuteLabels(TreeRouter(TreeScore(5, 3, k=2))) for _ in range(2)]
    routings = [router(torch.randn(7, 5)) for router in routers]
    expected = 0.0
    for routing in routings:
        expected += sum(-p * math.log(p + 1e-6) for p in routing.paths.flatten().tolist()) / 7
    assert routing_loss(routings, weight=0.5).item() == pytest.approx(0.5 * expected, rel=1e-5)
    model = nn.ModuleList(routers)
    both = sum(permutation_entropy(router.permutation.matrix()).item() for router in routers)
    assert permutation_loss(model, weight=0.5).item() == pytest.approx(0.5 * both, rel=1e-5)
    routers[0].permutation.harden()
    left = permutation_entropy(routers[1].permutation.matrix()).item()
    assert permutation_loss(model, weight=0.5).item() == pytest.approx(0.5 * left, rel=1e-5)


def test_a_shared_permutation_is_penalised_once():
    shared = LearnedPermutation(3)
    model = nn.ModuleList(PermuteLabels(TreeRouter(TreeScore(5, 3, k=1)), shared) for _ in range(3))
    torch.testing.assert_close(permutation_loss(model, weight=1.0), permutation_entropy(shared.matrix()))
