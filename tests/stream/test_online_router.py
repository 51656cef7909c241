import pickle

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from coterie.stream import OnlineRouter


def router(features=5, experts=4, **options):
    settings = {"lr": 2e-3, "batch": 8, "rng": np.random.default_rng(0)}
    return OnlineRouter(features, experts, (16, 8), **settings | options)


def rows(count, features=5, experts=4, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(3, 2, (count, features)), rng.integers(0, 2, (count, experts))


def test_its_steps_are_those_of_torchs_adam_on_the_binary_cross_entropy():
    ours = router(scale=False)
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for layer, (weight, bias) in zip(net[::2], ours._layers, strict=True):
            layer.weight.copy_(torch.from_numpy(weight.T.copy()))
            layer.bias.copy_(torch.from_numpy(bias.copy()))
    adam = torch.optim.Adam(net.parameters(), lr=2e-3)
    x_ND, targets_NE = rows(80)
    for i, (x_D, target_E) in enumerate(zip(x_ND, targets_NE, strict=True)):
        assert ours.learn(x_D, target_E) == (i % 8 == 7)
        if i % 8 == 7:
            x, t = (torch.tensor(array[i - 7 : i + 1]).float() for array in (x_ND, targets_NE))
            adam.zero_grad()
            F.binary_cross_entropy_with_logits(net(x), t).backward()
            adam.step()
    expected = net(torch.tensor(x_ND).float()).detach().numpy()
    np.testing.assert_allclose(ours.logits(x_ND), expected, atol=2e-5)


def test_between_two_steps_rows_are_judged_alike_one_by_one_or_together():
    ours = router()
    x_ND, targets_NE = rows(20)
    for x_D, target_E in zip(x_ND, targets_NE, strict=True):
        ours.learn(x_D, target_E)
    alone = np.array([ours.logits(x_D) for x_D in x_ND])
    np.testing.assert_allclose(ours.logits(x_ND), alone, rtol=1e-5, atol=1e-6)
    assert (ours.logits(x_ND).argmax(1) == alone.argmax(1)).all()


def test_the_scaler_knows_mean_and_deviation_of_all_rows_up_to_the_last_step():
    ours = router()
    x_ND, targets_NE = rows(24)
    x_ND[3, 2] = np.nan
    for x_D, target_E in zip(x_ND, targets_NE, strict=True):
        ours.learn(x_D, target_E)
    scaled = ours._scaled(x_ND)
    expected = (x_ND - np.nanmean(x_ND, 0)) / np.nanstd(x_ND, 0)
    np.testing.assert_allclose(scaled, np.nan_to_num(expected), atol=1e-5)


def test_a_new_feature_changes_no_logit_and_learns_afterwards():
    ours = router(batch=4)
    x_ND, targets_NE = rows(40)
    for x_D, target_E in zip(x_ND, targets_NE, strict=True):
        ours.learn(x_D, target_E)
    before = ours.logits(x_ND)
    ours.grow(6, 5)
    wider_ND = np.column_stack([x_ND, np.random.default_rng(2).normal(size=len(x_ND))])
    np.testing.assert_allclose(ours.logits(wider_ND)[:, :4], before, atol=1e-6)
    wider_targets_NE = np.column_stack([targets_NE, wider_ND[:, 5] > 0])
    for _ in range(60):
        for x_D, target_E in zip(wider_ND, wider_targets_NE, strict=True):
            ours.learn(x_D, target_E)
    assert ((ours.logits(wider_ND)[:, 4] > 0) == (wider_ND[:, 5] > 0)).mean() > 0.9


def test_a_pickled_copy_goes_on_learning():
    ours = router(batch=2)
    copy = pickle.loads(pickle.dumps(ours))
    for x_D, target_E in zip(*rows(10), strict=True):
        ours.learn(x_D, target_E)
        copy.learn(x_D, target_E)
    x_D = np.ones(5)
    np.testing.assert_array_equal(ours.logits(x_D), copy.logits(x_D))


def test_dropout_acts_in_steps_only():
    ours, x_D = router(dropout=0.5, batch=1, scale=False), np.ones(5)
    np.testing.assert_array_equal(ours.logits(x_D), ours.logits(x_D))
    plain = router(batch=1, scale=False)
    np.testing.assert_array_equal(ours.logits(x_D), plain.logits(x_D))
    ours.learn(x_D, np.ones(4))
    plain.learn(x_D, np.ones(4))
    assert (ours.logits(x_D) != plain.logits(x_D)).any()
