"""The loop: what it changes, when it stops, what it refuses."""

import pytest
import torch
from tiny_moe import LENGTH, tiny_moe, two_texts

from coterie.hf import find_moe_blocks, route
from coterie.tune import METHODS, SCOPES, Batch, Target, attribute_experts, unlearn
from coterie.tune.measure import predict

FORGET, RETAIN = ([Batch(text)] for text in two_texts(repeats=2))


def accuracies(model):
    return {"forget": predict(model, FORGET).accuracy, "retain": predict(model, RETAIN).accuracy}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_forgets_and_changes_nothing_but_the_expert_and_its_router(taught, method):
    before = {name: tensor.clone() for name, tensor in taught.state_dict().items()}
    knew = predict(taught, FORGET)
    target = Target(1, 1)
    done = unlearn(taught, FORGET, RETAIN, method=method, targets=[target], steps=30, lr=5e-3)
    assert predict(taught, FORGET).cross_entropy > knew.cross_entropy + 0.1
    assert done.targets == [target]
    assert len(done.history) == 30
    block = find_moe_blocks(taught)[1]
    for name, now in taught.state_dict().items():
        if name in block.layout.experts.values():
            assert torch.equal(now[[0, 2, 3]], before[name][[0, 2, 3]]), name
        elif name != block.layout.router["rows"]:
            assert torch.equal(now, before[name]), name
    assert not any(p.grad is not None for p in taught.parameters())


def test_with_a_loss_on_what_should_stay_it_stays(taught):
    unlearn(taught, FORGET, RETAIN, method="gdiff", steps=40, lr=3e-3)
    left = accuracies(taught)
    assert left["retain"] > 0.9 > 0.6 > left["forget"]


def test_the_target_is_the_expert_with_the_most_affinity(taught):
    expected = attribute_experts(taught, FORGET).ranked()[0]
    assert unlearn(taught, FORGET, steps=1).targets == [expected]


def test_it_stops_at_the_forget_level_and_looks_when_it_was_told_to(taught):
    options = {"steps": 60, "lr": 5e-3, "evaluate": accuracies, "evaluate_every": 3}
    done = unlearn(taught, FORGET, RETAIN, method="gdiff", stop_at=0.6, **options)
    assert done.reached
    assert done.history[-1].measured["forget"] <= 0.6
    assert all(step.measured["forget"] > 0.6 for step in done.history[:-1] if step.measured)
    assert [s.step for s in done.history if s.measured] == list(range(0, done.history[-1].step + 1, 3))
    assert accuracies(taught) == dict(done.history[-1].measured)


def test_what_is_forgotten_already_is_not_trained(taught):
    before = {name: tensor.clone() for name, tensor in taught.state_dict().items()}
    done = unlearn(taught, FORGET, evaluate=lambda model: {"forget": 0.0}, stop_at=0.1)
    assert (done.reached, len(done.history)) == (True, 1)
    assert all(torch.equal(now, before[name]) for name, now in taught.state_dict().items())


def test_the_anchor_draws_the_routers_scores_to_the_target():
    scores = {}
    for alpha in (0.0, 1.0):
        model = tiny_moe()
        done = unlearn(model, FORGET, targets=[Target(1, 2)], steps=10, lr=1e-2, alpha=alpha)
        with torch.no_grad():
            _, routings = route(model, find_moe_blocks(model), input_ids=FORGET[0].ids_BS)
        scores[alpha] = routings[1].scores[:, 2].min().item()
    assert scores[1.0] > 0.7 > 0.5 > scores[0.0]
    assert done.history[-1].anchor < done.history[0].anchor / 10


def test_the_anchor_acts_on_the_tokens_it_is_given():
    model = tiny_moe()
    [batch] = FORGET
    none = Batch(batch.ids_BS, anchored_BS=torch.zeros_like(batch.ids_BS, dtype=torch.bool))
    assert unlearn(model, [none], targets=[Target(0, 0)], steps=1).history[0].anchor == 0
    assert unlearn(model, FORGET, targets=[Target(0, 0)], steps=1).history[0].anchor > 0


def test_padding_is_not_learned_from(taught):
    [batch] = FORGET
    longer = torch.cat((batch.ids_BS, torch.full((4, 4), 7)), 1)
    present = (torch.arange(LENGTH + 4) < LENGTH).expand(4, -1)
    other = tiny_moe()
    other.load_state_dict(taught.state_dict())
    options = {"targets": [Target(1, 0)], "steps": 2, "lr": 1e-2}
    for one, text in ((taught, batch), (other, Batch(longer, present_BS=present))):
        unlearn(one, [text], **options)
    for a, b in zip(taught.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_scopes_train_what_they_say():
    shares = {}
    for scope in SCOPES:
        model, before = tiny_moe(), tiny_moe().state_dict()
        done = unlearn(model, FORGET, scope=scope, targets=[Target(0, 1)], steps=2, lr=1e-3)
        changed = {name for name, now in model.state_dict().items() if not torch.equal(now, before[name])}
        gates = {f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)}
        banks = {f"model.layers.{i}.mlp.experts.{m}_proj" for i in (0, 1) for m in ("gate_up", "down")}
        expected = {
            "expert": {n for n in gates | banks if ".0." in n},
            "experts": banks,
            "router": gates,
        }
        assert changed == expected.get(scope, changed)
        shares[scope] = done.trained_share
        assert done.trained == pytest.approx(done.trained_share * sum(p.numel() for p in model.parameters()))
    assert shares["all"] == 1
    assert shares["router"] < shares["expert"] < shares["experts"] < 1


def test_a_loss_that_is_no_number_ends_it_with_the_step_and_without_that_step(taught):
    block = find_moe_blocks(taught)[1]
    with torch.no_grad():
        block.experts.down[3].fill_(float("inf"))
    before = block.experts.down.clone()
    with pytest.raises(ValueError, match=r"step 1: the losses are forget nan.*use a smaller lr than 0\.002"):
        unlearn(taught, FORGET, targets=[Target(1, 3)], lr=2e-3)
    assert torch.equal(block.experts.down, before)
    assert all(p.requires_grad for p in taught.parameters())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([],), {}, "there is no text to forget"),
        ((FORGET,), {"method": "npo"}, "npo has a loss on text to keep; give some, or use ga"),
        ((FORGET, FORGET), {"method": "gdiff"}, "are the same"),
        ((FORGET,), {"method": "magic"}, "no method 'magic'; use one of ga, gdiff, npo, rmu, kl"),
        ((FORGET,), {"scope": "half"}, "no scope 'half'; use one of expert, experts, router, all"),
        ((FORGET,), {"steps": 0}, "steps=0"),
        ((FORGET,), {"stop_at": 0.1}, r"stop_at=0\.1 needs evaluate"),
        ((FORGET,), {"stop_at": 0.1, "evaluate": lambda model: {"kept": 1.0}}, "evaluate returned kept"),
        ((FORGET,), {"targets": [Target(5, 0)]}, "layer 5: the model has 2 MoE blocks"),
        ((FORGET,), {"anchor_on": "sigmoid"}, "on='sigmoid'"),
    ],
)
def test_what_cannot_be_is_refused(model, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        unlearn(model, *arguments, **options)


def test_a_dense_model_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE block"):
        unlearn(LlamaForCausalLM(config), FORGET)
