import pytest
import torch

from coterie.recsys.levels import Bank, Gate, Level, adatt, home, ple
from coterie.recsys.multi_task import PRESETS, MultiTaskMoE, expert_health
from coterie.recsys.training import train_on_rows

TASKS = {"click": "watch", "view": "watch", "like": "social", "follow": "social"}


def model_of(preset="home", **options):
    return MultiTaskMoE.from_preset(preset, 6, TASKS, hidden=4, tower=3, **options)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_layout_is_a_mask_and_no_gate_uses_what_it_does_not_reach(preset):
    model = model_of(preset)
    logits, levels = model(torch.randn(9, 6))
    assert logits.shape == (9, 4)
    for level, output in zip(model.layout, levels, strict=True):
        assert bool((output.weights_TGE[:, ~level.reach] == 0).all())
        for gate in range(len(level.gates)):
            output.routing(gate).validate()


def test_a_task_in_home_does_not_depend_on_the_other_category_but_through_what_all_share():
    """No gate of a watch task reaches an expert of social, on either level."""
    lower, upper = home(TASKS)
    named = dict(zip(lower.gates, lower.reach, strict=True))
    assert [lower.bank_of[e] for e in named["category watch"].nonzero().flatten()] == [
        *("all", "all", "category watch", "category watch")
    ]
    assert bool(named["all"].all())
    click = upper.reach[list(upper.gates).index("click")]
    assert [upper.bank_of[e] for e in click.nonzero().flatten()] == ["all", "category watch", "click"]


def test_the_loss_of_one_category_leaves_the_experts_of_the_other_without_gradient():
    lower, upper = home(TASKS)
    isolated = Level(lower.banks, {**lower.gates, "all": Gate(("all",), own="all")})
    model = MultiTaskMoE(6, [isolated, upper], hidden=4, tower=3)
    model(torch.randn(9, 6))[0][:, :2].sum().backward()  # the watch tasks
    for level, gated in zip(model.layout, model.levels, strict=True):
        gradient = gated.experts.weight.grad.abs().sum((1, 2))
        social = torch.tensor([bank in ("category social", "like", "follow") for bank in level.bank_of])
        assert bool((gradient[social] == 0).all())
        assert bool((gradient[~social] > 0).all())


def test_the_self_gate_teaches_own_experts_that_the_softmax_has_given_up():
    for self_gate, learns in ((True, True), (False, False)):
        model = model_of(self_gate=self_gate)
        upper, level = model.levels[1], model.layout[1]
        own = torch.tensor([bank == "like" for bank in level.bank_of])
        gate_N, bias = upper.gates.gate_N, upper.gates.bias.data
        like = list(level.gates).index("like")
        place = torch.arange(len(level.bank_of)).expand(4, -1)[level.reach]
        bias[(gate_N == like) & own[place]] = -1000.0
        model(torch.randn(9, 6))[0][:, like].sum().backward()
        assert bool(upper.experts.weight.grad[own].abs().sum() > 0) == learns


def test_a_level_is_what_a_loop_over_gates_and_experts_makes_of_it():
    model = model_of().double().eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    _, levels = model(x)
    below = {"input": x}
    for level, gated, output in zip(model.layout, model.levels, levels, strict=True):
        banks = {}
        for number, (name, bank) in enumerate(level.banks.items()):
            views = gated.feature_gate(torch.stack([below[bank.reads]] * len(level.banks), 1))
            banks[name] = views[:, number]
        expert_inputs = torch.stack([banks[name] for name in level.bank_of], 1)
        torch.testing.assert_close(output.outputs_TEH, gated.experts(expert_inputs))
        new = {}
        for g, name in enumerate(level.gates):
            new[name] = sum(
                output.total_TGE[:, g, e, None] * output.outputs_TEH[:, e] for e in range(len(level.bank_of))
            )
        below = new
    logits = torch.cat([tower(below[task]) for tower, task in zip(model.towers, TASKS, strict=True)], 1)
    torch.testing.assert_close(model(x)[0], logits)


def test_mmoe_is_the_same_as_one_written_out():
    model = model_of("mmoe", experts=3).double()
    x, level = torch.randn(5, 6, dtype=torch.float64), model.levels[0]
    outputs = [torch.relu(x @ level.experts.weight[e] + level.experts.bias[e]) for e in range(3)]
    for task in range(4):
        rows = slice(3 * task, 3 * task + 3)
        weights = (x @ level.gates.weight[rows].T + level.gates.bias[rows]).softmax(-1)
        h = sum(weights[:, e, None] * outputs[e] for e in range(3))
        torch.testing.assert_close(model(x)[0][:, task], model.towers[task](h).squeeze(1))


def test_parameters_are_those_of_the_sheet():
    tasks = {f"{c}{n}": c for c in "AB" for n in range(3)}

    def count(preset, **options):
        model = MultiTaskMoE.from_preset(preset, 32, tasks, **options)
        return sum(p.numel() for p in model.parameters())

    assert [count("mmoe", experts=10), count("cgc", shared=4), count("home")] == [15810, 14820, 32298]


def test_adatt_and_ple_hand_each_task_its_own_output_on():
    for level in (ple(TASKS)[1], adatt(TASKS)[1]):
        assert {name: bank.reads for name, bank in level.banks.items()} == {n: n for n in level.banks}
        assert list(level.gates) == list(TASKS)
    assert bool(adatt(TASKS)[1].reach.all())
    assert ple(TASKS)[1].reach.sum() == 3 * len(TASKS)


def test_health_names_the_level_of_each_expert_and_leaves_the_mode_alone():
    model = model_of().train()
    statistics = model.levels[0].experts.norm.running_mean.clone()
    health = expert_health(model, [torch.randn(40, 6), torch.randn(8, 6)])
    assert [len(level.std) for level in health] == [6, 7]
    assert model.training
    torch.testing.assert_close(model.levels[0].experts.norm.running_mean, statistics)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultiTaskMoE.from_preset("moe", 6, TASKS), "use one of shared-bottom"),
        (lambda: MultiTaskMoE.from_preset("home", 6, {"click": ""}), "'click'.*exactly one"),
        (lambda: MultiTaskMoE.from_preset("home", 6, {}), "no task"),
        (lambda: home({"all": "watch"}), "called 'all'"),
        (lambda: ple({"shared": "watch"}), "called 'shared'"),
        (lambda: MultiTaskMoE(6, [Level({"a": Bank(1)}, {"t": Gate(("b",))})]), r"reaches \['b'\]"),
        (lambda: MultiTaskMoE(6, [Level({"a": Bank(1)}, {"t": Gate(())})]), "no bank"),
        (lambda: MultiTaskMoE(6, [Level({"a": Bank(0)}, {"t": Gate(("a",))})]), "0 experts"),
        (lambda: MultiTaskMoE(6, [Level({"a": Bank(1, "b")}, {"t": Gate(("a",))})]), r"reads \['b'\]"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_last_batch_of_one_row_joins_the_one_before():
    model, seen = torch.nn.Linear(1, 1), []

    def loss(batch):
        seen.append(len(batch[0]))
        return model(batch[0]).square().mean()

    train_on_rows(model, [torch.randn(9, 1)], loss, epochs=2, batch_size=4, lr=0.1, seed=0)
    assert seen == [4, 5, 4, 5]
    with pytest.raises(ValueError, match="at least 2"):
        train_on_rows(model, [torch.randn(1, 1)], loss, epochs=1, batch_size=4, lr=0.1, seed=0)
    with pytest.raises(ValueError, match="use a smaller lr"):
        train_on_rows(model, [torch.full((4, 1), torch.inf)], loss, epochs=1, batch_size=4, lr=0.1, seed=0)
