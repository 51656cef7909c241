import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.language.alf_lb import (
    BiasUpdate,
    dual_value,
    max_violation,
    preference_violations,
    proportional_rule,
    regret,
    replay,
    sign_rule,
    solve_assignment,
)
from coterie.nn import TopK
from coterie.nn.balance import loss_free_update
from coterie.train import Run

RULES = {
    "sign": sign_rule(0.02),
    "sign-sqrt": sign_rule(0.1, "sqrt"),
    "proportional": proportional_rule(0.5, 2),
    "proportional-inverse": proportional_rule(2.0, 2, "inverse"),
    "any function": lambda loads_E, step: torch.linspace(-1, 1, len(loads_E)) * loads_E / step**2,
}


def scores(seed, tokens=64, experts=6):
    generator = torch.Generator().manual_seed(seed)
    wanted_E = torch.linspace(0, 1, experts, dtype=torch.float64)
    return torch.rand(tokens, experts, generator=generator, dtype=torch.float64) + wanted_E


def best_balanced_assignment(scores_TE, k):
    """The largest summed score of all assignments in which every expert gets its share, one by one."""
    tokens, experts = scores_TE.shape
    share, best = tokens * k // experts, -math.inf
    sets = list(itertools.combinations(range(experts), k))
    for choice in itertools.product(sets, repeat=tokens):
        counts = np.bincount([expert for chosen in choice for expert in chosen], minlength=experts)
        if (counts == share).all():
            value = sum(float(scores_TE[i, list(chosen)].sum()) for i, chosen in enumerate(choice))
            best = max(best, value)
    return best


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 5))
def test_the_change_of_the_dual_is_what_the_tokens_win_less_what_the_step_gains(rule, seed, k):
    for step in replay(scores(seed), k, rule, steps=20):
        assert step.change == pytest.approx(step.benefit - step.gain, abs=1e-9)
        assert step.benefit >= -1e-9


@pytest.mark.parametrize("rule", [RULES["sign"], RULES["sign-sqrt"]])
@given(seed=st.integers(0, 10**6), k=st.integers(1, 5))
def test_no_token_moves_to_an_expert_that_is_as_busy(rule, seed, k):
    path = list(replay(scores(seed), k, rule, steps=20))
    assert sum(step.preference_violations for step in path) == 0


@given(seed=st.integers(0, 10**6), k=st.integers(1, 5))
def test_a_load_that_has_crossed_its_share_stays_within_what_a_step_can_move(seed, k):
    path = list(replay(scores(seed), k, sign_rule(0.02), steps=80))
    errors_NE = torch.stack([step.loads_E for step in path]).double() - 64 * k / 6
    crossed_NE = (errors_NE.sign() != errors_NE[0].sign()).cummax(0).values
    assert (errors_NE.abs() * crossed_NE).max() <= max(step.near for step in path)


def test_a_step_away_from_balance_is_seen_by_every_check():
    def wrong_sign(loads_E, step):
        return -sign_rule(0.02)(loads_E, step)

    path = list(replay(scores(0), 2, wrong_sign, steps=20))
    assert sum(step.preference_violations for step in path) > 0
    assert max_violation(path[-1].loads_E) > max_violation(path[0].loads_E)


def test_replay_agrees_with_a_plain_loop():
    scores_TE, bias_E = scores(1), torch.zeros(6, dtype=torch.float64)
    for step in replay(scores_TE, 2, sign_rule(0.02), steps=30):
        loads_E = torch.zeros(6)
        for token in (scores_TE + bias_E).tolist():
            for expert in sorted(range(6), key=lambda e: -token[e])[:2]:
                loads_E[expert] += 1
        assert step.loads_E.tolist() == loads_E.tolist()
        assert step.dual == pytest.approx(dual_value(scores_TE, bias_E, 2))
        loss_free_update(bias_E, loads_E, 0.02)
        torch.testing.assert_close(step.bias_E, bias_E)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(6, 3, 1), (6, 3, 2), (6, 2, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_dual_at_the_oracles_bias_is_the_best_balanced_assignment(tokens, experts, k, seed):
    scores_TE = scores(seed, tokens, experts)
    assert dual_value(scores_TE, solve_assignment(scores_TE, k), k) == pytest.approx(
        best_balanced_assignment(scores_TE, k), abs=1e-6
    )


@given(seed=st.integers(0, 10**6), k=st.integers(1, 5), shift=st.floats(-5, 5))
def test_no_bias_is_better_than_the_oracles_and_a_common_shift_changes_nothing(seed, k, shift):
    scores_TE = scores(seed, tokens=60)
    best_E = solve_assignment(scores_TE, k)
    best = dual_value(scores_TE, best_E, k)
    assert dual_value(scores_TE, best_E + shift, k) == pytest.approx(best)
    for step in replay(scores_TE, k, sign_rule(0.05, "sqrt"), steps=100):
        assert step.dual >= best - 1e-6
    assert regret(scores_TE, step.bias_E, best_E, k) >= -1e-8


def test_the_sign_rule_is_the_loss_free_update_of_the_core():
    loads_E, bias_E = torch.tensor([5, 1, 3]), torch.zeros(3)
    loss_free_update(bias_E, loads_E, 0.1)
    torch.testing.assert_close(sign_rule(0.1)(loads_E, 7).float(), bias_E)


@pytest.mark.parametrize(("schedule", "factor"), [("constant", 1), ("sqrt", 0.5), ("inverse", 0.25)])
def test_schedules_at_the_fourth_step(schedule, factor):
    loads_E = torch.tensor([4, 0])
    assert sign_rule(0.2, schedule)(loads_E, 4).tolist() == pytest.approx([-0.2 * factor, 0.2 * factor])
    # half of the tokens too many at the first expert
    assert proportional_rule(0.2, 1, schedule)(loads_E, 4)[1].item() == pytest.approx(0.1 * factor)


def test_the_callback_moves_every_layers_bias_and_keeps_it_within_its_limits():
    model = torch.nn.ModuleList(TopK(1, bias=torch.zeros(3)) for _ in range(2))
    run = Run(model, None, 1, 10, 0.0, {}, [torch.tensor([6, 0, 0]), torch.tensor([2, 2, 2])])
    BiasUpdate(sign_rule(0.5), recenter=True).on_step(run)
    torch.testing.assert_close(model[0].bias, torch.tensor([-2 / 3, 1 / 3, 1 / 3]))
    assert model[1].bias.tolist() == [0, 0, 0]
    BiasUpdate(sign_rule(5.0), max_abs=1.0).on_step(run)
    assert model[0].bias.tolist() == [-1, 1, 1]
    run.loads = [torch.tensor([6, 0, 0])]
    with pytest.raises(
        ValueError, match=r"selection biases over \[3, 3\] experts but routed layers over \[3\]"
    ):
        BiasUpdate(sign_rule(0.5)).on_step(run)


def test_only_moves_to_a_less_loaded_expert_are_in_order():
    before = torch.tensor([[True, True, False, False], [True, False, True, False]])
    after = torch.tensor([[False, False, True, True], [True, False, True, False]])
    assert preference_violations(before, after, torch.tensor([5, 4, 1, 2])) == 0
    assert preference_violations(before, after, torch.tensor([5, 2, 1, 3])) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sign_rule(-1e-3), "u=-0.001; should be at least 0"),
        (
            lambda: proportional_rule(1.0, 2, "cosine"),
            "schedule='cosine'; use one of constant, sqrt, inverse",
        ),
        (lambda: list(replay(scores(0), 7, sign_rule(0.1), 1)), "top_k=7"),
        (lambda: solve_assignment(scores(0), 6), "uses all of them"),
        (lambda: solve_assignment(torch.rand(4), 1), r"shape \(4,\)"),
        (
            lambda: list(replay(torch.tensor([[1.0, math.nan]]), 1, sign_rule(0.1), 1)),
            "scores of 1 tokens hold NaN",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_your_own_router_is_replayed(tmp_path):
    from coterie.reproduce.alf_lb import read_data

    for i in range(2):
        np.save(tmp_path / f"layer{i}.npy", scores(i, tokens=128, experts=8).numpy().astype(np.float32))
    assert [s.shape for s in read_data(tmp_path).scores] == [(128, 8)] * 2
    coterie = str(Path(sys.executable).with_name("coterie"))
    arms = "fixed/sign-1e-2,online/sign-1e-2"
    done = subprocess.run(
        [
            coterie,
            "reproduce",
            "alf-lb",
            "--budget=smoke",
            "--data",
            tmp_path,
            "--arms",
            arms,
            "--out",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_your_own_text_is_trained_on(tmp_path):
    from coterie.reproduce.alf_lb import ARMS, read_data

    (tmp_path / "prose.txt").write_text("The cat sat on the mat. " * 800)
    values = ARMS["train/sign-5e-3"](0, "smoke", read_data(tmp_path))
    assert 3 < values["cross-entropy, nats"] < 7


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5), r"shape \(5,\); should be \[tokens, experts\]"),
        (np.full((4, 3), np.nan), "scores of 4 tokens hold NaN"),
        (np.zeros((4, 1)), "top_k=2"),
        (np.array([["a", "b"]]), "should be numpy.save of floats"),
    ],
)
def test_scores_in_another_format_are_refused_by_file(tmp_path, array, message):
    from coterie.reproduce.alf_lb import read_data

    np.save(tmp_path / "scores.npy", array)
    with pytest.raises(ValueError, match=f"scores.npy: .*{message}"):
        read_data(tmp_path / "scores.npy")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"text.npy: .*should be numpy.save"):
        read_data(tmp_path / "text.npy")


def test_files_of_different_routers_are_refused(tmp_path):
    from coterie.reproduce.alf_lb import read_data

    np.save(tmp_path / "a.npy", np.zeros((4, 3)))
    np.save(tmp_path / "b.npy", np.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"over \[3, 5\] experts"):
        read_data(tmp_path)
