"""What a recipe may say, and how it is told what it got wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.nn import TopK, parameters_per_expert
from coterie.recipe import Recipe, build
from coterie.recipe.recipe import SECTIONS, parts
from coterie.recipe.systems import SYSTEMS


def test_a_recipe_written_back_reads_as_the_same():
    recipe = Recipe.parse(
        "name: mine\ntext: [a.txt, b]\nmodel: {layers: 1}\nrouter: {name: top-p, p: 0.3}\n"
        "experts: mlp\nloss: {entropy: 1e-2}\ntrain: {steps: 7, lr: 3e-3, warmup_steps: null}\n"
    )
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert recipe.loss == {"entropy": 0.01}  # YAML reads 1e-2 as text
    assert recipe.experts == {"name": "mlp"}


def test_options_win_over_the_file():
    text = "router: {name: top-k, k: 1}\ntrain: {steps: 7}"
    recipe = Recipe.parse(text, [("router.k", 3), ("train.steps", 9)])
    assert (recipe.router["k"], recipe.train.steps) == (3, 9)
    assert Recipe.parse(text, [("router", "top-p"), ("router.p", 0.2)]).router == {"name": "top-p", "p": 0.2}
    assert Recipe.parse("router: top-k", [("router.k", 3)]).router == {"name": "top-k", "k": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {dim: 8}", r"r.yaml, line 1: no section 'modle'; did you mean 'model'\?"),
        ("train:\n  steps: 3\n  stepz: 4", r"line 3: training has no option 'stepz'; did you mean 'steps'\?"),
        ("router: top-q", r"line 1: no router 'top-q'; did you mean 'top-[pk]'\?"),
        ("router:\n  p: 0.3", "line 1: router has no name"),
        ("router:\n  name: top-p", "line 1: router top-p needs p"),
        ("router:\n  name: top-p\n  p: high", "line 3: router top-p: p is 'high'; should be float"),
        ("router: hash\nscore: cosine", "line 2: router hash scores by itself; leave score out"),
        ("train: {steps: 2.5}", r"line 1: training: steps is 2.5; should be int"),
        ("train: {steps: true}", "should be int"),
        ("train: 3", "line 1: train is 3; should be options"),
        ("text: {a: b}", "text is {'a': 'b'}; should be a path or a list of paths"),
        (
            "model: {num_experts: 0}\nrouter: top-k",
            "line 2: model.num_experts is 0, which makes a dense model",
        ),
        ("system: alf-lb\nexperts: mlp", "line 2: system alf-lb has a router and experts of its own"),
        ("system: alf-ld", r"no system 'alf-ld'; did you mean 'alf-lb'\?"),
        ("a: [", "r.yaml, line 1: this is no YAML"),
        ("- a", "r.yaml holds a list; should be sections"),
        ("model: {top_k: 9}", "top_k=9 but num_experts=8"),
    ],
)
def test_a_wrong_recipe_is_told_where_and_what_would_be_right(text, message):
    with pytest.raises(ValueError, match=message):
        Recipe.parse(text, source="r.yaml")


def test_an_option_of_the_command_line_is_named_as_one():
    with pytest.raises(ValueError, match=r"--router.pp: router top-p has no option 'pp'"):
        Recipe.parse("router: {name: top-p, p: 0.3}", [("router.pp", 0.4)])
    with pytest.raises(ValueError, match=r"missing\.yaml is no file"):
        Recipe.read("missing.yaml")


SMALL = {"dim": 16, "layers": 2, "heads": 1, "kv_heads": 1, "head_dim": 16, "hidden": 32, "expert_hidden": 8}
REQUIRED = {
    "top-p": {"p": 0.4},
    "threshold": {"threshold": 0.2},
    "mlp": {"hidden": 8},
    "trees": {"k": 2},
    "dselect-k": {"k": 2},
}


@given(data=st.data())
def test_any_score_router_and_bank_make_a_model_that_trains(data):
    import torch

    router = data.draw(st.sampled_from(sorted(parts()["router"])))
    bank = data.draw(st.sampled_from(sorted(parts()["experts"])))
    score = data.draw(st.sampled_from([None, *sorted(parts()["score"])]))
    recipe = {
        "model": SMALL,
        "router": {"name": router, **REQUIRED.get(router, {})},
        "experts": {"name": bank},
    }
    if score and router in ("top-k", "top-p", "threshold", "soft"):
        if bank == "swiglu+zero-cost" and score == "dselect-k":
            recipe["experts"] = {"name": bank, "zero": 4, "constant": 3}  # 16: a power of 2
        recipe["score"] = {"name": score, **REQUIRED.get(score, {})}
    method = build(Recipe.parse(str(recipe).replace("None", "null")))
    ids = torch.randint(257, (2, 9))
    logits, routings = method.model(ids)
    logits.sum().backward()
    assert len(routings) == 2
    assert logits.isfinite().all()
    experts = method.model.layers[0].mlp.experts
    assert len(parameters_per_expert(experts)) == experts.num_experts == routings[0].num_experts


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_every_system_makes_a_model_with_its_loss(system):
    import torch

    method = build(Recipe.parse(f"{{model: {SMALL}, system: {system}}}"))
    logits, routings = method.model(torch.randint(257, (2, 9)))
    loss = logits.logsumexp(-1).mean()
    if method.routing_loss is not None:
        loss = loss + method.routing_loss(routings)
    loss.backward()
    assert loss.isfinite()


def test_k_is_the_models_top_k_unless_given():
    def k(text):
        select = build(Recipe.parse(text)).model.layers[0].mlp.router.select
        assert isinstance(select, TopK)
        return select.k

    assert k("{model: {top_k: 3}, router: top-k}") == 3
    assert k("{model: {top_k: 3}, router: {name: top-k, k: 1}}") == 1


def test_the_list_of_parts_covers_every_section_with_options():
    assert set(parts()) | {"name", "text"} == set(SECTIONS)
