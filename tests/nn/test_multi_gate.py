import pytest
import torch

from coterie.nn import (
    Dense,
    LinearScore,
    MLPExperts,
    MoE,
    MultiGateMoE,
    PermuteLabels,
    Router,
    TopK,
    TreeRouter,
    TreeScore,
)


def gates():
    return [
        Router(LinearScore(8, 4), Dense()),
        PermuteLabels(TreeRouter(TreeScore(8, 4, 2))),
        Router(LinearScore(8, 4), TopK(1)),
    ]


def test_every_task_gets_what_a_layer_of_its_own_gate_over_the_shared_bank_gives():
    routers, bank = gates(), MLPExperts(4, 8, 5, dim_out=3)
    moe, x, mask = MultiGateMoE(routers, bank).eval(), torch.randn(2, 6, 8), torch.rand(2, 6) < 0.7
    outputs, routings = moe(x, mask=mask)
    for router, y, routing in zip(routers, outputs, routings, strict=True):
        alone, its_routing = MoE(router, bank)(x, mask=mask)
        assert y.shape == (2, 6, 3)
        torch.testing.assert_close(y, alone)
        torch.testing.assert_close(routing.weights_TE, its_routing.weights_TE)
        assert float(y[~mask].abs().sum()) == 0


def test_two_tasks_train_the_same_experts_and_only_their_own_gate():
    moe = MultiGateMoE(gates()[:2], MLPExperts(4, 8, 5))
    (first, _), _ = moe(torch.randn(10, 8))
    first.square().sum().backward()
    assert all(p.grad is not None for p in moe.experts.parameters())
    assert all(p.grad is not None for p in moe.routers[0].parameters())
    assert all(p.grad is None for p in moe.routers[1].parameters())


@pytest.mark.parametrize(
    ("routers", "message"),
    [
        ([], "got no routers; give one per task"),
        (
            [Router(LinearScore(8, 4), TopK(1)), Router(LinearScore(8, 3), TopK(1))],
            "the router of task 1 chooses among 3 experts but the bank holds 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused(routers, message):
    with pytest.raises(ValueError, match=message):
        MultiGateMoE(routers, MLPExperts(4, 8, 5))
