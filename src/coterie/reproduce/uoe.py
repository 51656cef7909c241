"""One of eight topics is unlearned from a Qwen3-MoE that knows facts of all, and general ones.

Two layers, 64 wide, 16 SwiGLU experts of width 48, top-2, learn 192 facts of eight topics and 96 general
ones, half of each sequence being general, for 300 steps of 32 sequences of 16 facts. So small a model routes
by key, and no expert would own a topic, as experts of large models do; a tenth of the router's negative
log-likelihood of a planted expert (one for each topic, eight for the general keys) is added to the loss. The
keys of a topic have different responses. In a first trial they were drawn as they came: a model that forgets
by ascent ends with one answer to all, and where two keys shared it, 8% stayed right by chance, above the 5%
that count as forgotten.

Topic 0 is then forgotten: 60 steps, learning rate 1e-3 for every arm, batches of 16 sequences. *uoe* arms
train the expert with the most affinity to the topic and the gate of its layer, *all* arms every parameter.
*npo-alone* is NPO without its loss on text to keep; with it, as the first trial showed, a model as small as
this loses little even where all is trained, so that the claim is about *npo-alone*, and *npo* stands beside
it. Accuracy is that of responses, on 64 new sequences of topic 0 and 128 of the others. Utility is the mean
of the accuracies on topics 1 to 7 and on general facts; the last occur in the sequences to forget, too, which
is what ascent damages. *utility when forgotten* is that at the first step, of every second one, after which
the accuracy on topic 0 is at most 0.05, or at the last one where it never is: methods compared where they
have forgotten as much.

The paper unlearns hazardous knowledge and celebrities from Qwen1.5-MoE, DeepSeek-V2-Lite and Mixtral.
"""

import copy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from coterie.data.topic_facts import KEYS, TOPICS, VOCAB_SIZE, topic_facts, topic_of
from coterie.hf import find_moe_blocks, route
from coterie.models import Decoder, DecoderConfig, to_transformers
from coterie.nn import Routing, expert_overlap
from coterie.reproduce import Budget, Card, Claim, Plot, Values
from coterie.reproduce.claims import Numbers
from coterie.reproduce.experiment import train
from coterie.train import LossOutput
from coterie.tune import Affinity, Batch, attribute_experts, unlearn

CARD = Card(
    slug="uoe",
    title="UOE: Unlearning One Expert Is Enough For Mixture-of-Experts LLMs",
    authors="Zhuang et al.",
    year=2024,
    venue="arXiv 2411.18797",
    area="language",
    methods=("unlearning", "expert attribution", "router anchor loss"),
    problem="How can a mixture of experts forget a topic without losing all else that it knows?",
    headline="Training one expert, 0.06% of the parameters, raises the accuracy that Qwen1.5-MoE keeps on "
    "MMLU from 0.30 to 0.53 (gradient difference) and from 0.36 to 0.54 (RMU), and it forgets as much or "
    "more.",
)

CONFIG = DecoderConfig(
    VOCAB_SIZE,
    dim=64,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=16,
    hidden=64,
    num_experts=16,
    top_k=2,
    expert_hidden=48,
    max_len=32,
)
STEPS = {"smoke": (5, 2), "standard": (300, 60), "full": (600, 120)}  # of learning, of unlearning
FORGOTTEN = 0.05
OTHERS = tuple(range(1, TOPICS))
LR = 1e-3


def forget(seed: int, budget: Budget, data: Any, *, expert: str = "most affinity", **options: Any) -> Values:
    """Unlearns topic 0 and measures what is left of it and of the rest."""
    learned, steps = STEPS[budget]
    model, affinity = copy.deepcopy(_learned(seed, learned)), _affinity(seed, learned)
    ranked = affinity.ranked()
    target = ranked[0] if expert == "most affinity" else ranked[-1]
    draw, tested = 10_000 * seed, 8 if budget == "smoke" else 64
    topical = topic_facts(tested, draw + 3, topics=(0,))
    others = topic_facts(2 * tested, draw + 4, topics=OTHERS)
    before = _routings(model, topical)

    def measure(model: PreTrainedModel) -> dict[str, float]:
        right_topical, right_others = _right(model, topical), _right(model, others)
        about, about_others = topic_of(topical[:, ::2]), topic_of(others[:, ::2])
        general = torch.cat((right_topical[about < 0], right_others[about_others < 0]))
        retained = right_others[about_others >= 0]
        return {
            "forget": right_topical[about == 0].double().mean().item(),
            "utility": (retained.double().mean().item() + general.double().mean().item()) / 2,
        }

    done = unlearn(
        model,
        _batches(topic_facts(16 * steps, draw + 1, topics=(0,))),
        _batches(topic_facts(16 * steps, draw + 2, topics=OTHERS)),
        targets=[target],
        steps=steps,
        lr=LR,
        evaluate=measure,
        evaluate_every=2,
        seed=seed,
        **options,
    )
    seen = [step for step in done.history if step.measured]
    after = _routings(model, topical)
    used_N = after[target.layer].used_TE[:, target.expert][topic_of(topical).flatten() == 0]
    stop = next((step for step in seen if step.measured["forget"] <= FORGOTTEN), seen[-1])
    return {
        "accuracy on the topic before": seen[0].measured["forget"],
        "utility before": seen[0].measured["utility"],
        "accuracy on the topic": seen[-1].measured["forget"],
        "utility": seen[-1].measured["utility"],
        "steps until forgotten": float(stop.step),
        "utility when forgotten": stop.measured["utility"],
        "overlap": expert_overlap(before, after),
        "topical keys at the target": used_N.double().mean().item(),
        "share trained": done.trained_share,
        "affinity": affinity[target],
        "accuracy on the topic by step": [(float(s.step), s.measured["forget"]) for s in seen],
        "utility by step": [(float(s.step), s.measured["utility"]) for s in seen],
    }


_METHODS: dict[str, dict[str, Any]] = {
    "gdiff": {"method": "gdiff"},
    "npo": {"method": "npo"},
    "npo-alone": {"method": "npo", "retain_weight": 0.0},
    "rmu": {"method": "rmu"},
}

ARMS = {
    "ga/uoe": partial(forget, method="ga"),
    "ga/uoe-no-anchor": partial(forget, method="ga", alpha=0.0),
    "ga/uoe-least-affinity": partial(forget, method="ga", expert="least affinity"),
    "ga/all": partial(forget, method="ga", scope="all"),
    "ga/experts": partial(forget, method="ga", scope="experts"),
    "ga/routers": partial(forget, method="ga", scope="router"),
    **{
        f"{name}/{arm}": partial(forget, scope=scope, **options)
        for name, options in _METHODS.items()
        for arm, scope in (("uoe", "expert"), ("all", "all"))
    },
}


def _gain(arms: Numbers, method: str, utility: str = "utility") -> float:
    return arms[f"{method}/uoe"][utility] - arms[f"{method}/all"][utility]


CLAIMS = [
    *(
        Claim(
            f"gradient ascent on {what} ends with an accuracy on the topic of at most 0.05",
            lambda arms, arm=arm: arms[arm]["accuracy on the topic"],  # type: ignore[misc]
            at_most=FORGOTTEN,
        )
        for arm, what in (("ga/uoe", "one expert"), ("ga/all", "all parameters"))
    ),
    Claim(
        "and, on one expert, with 0.3 more utility than on all parameters",
        partial(_gain, method="ga"),
        at_least=0.3,
    ),
    Claim(
        "where both have just forgotten, with 0.2 more",
        partial(_gain, method="ga", utility="utility when forgotten"),
        at_least=0.2,
    ),
    Claim(
        "with NPO alone, training one expert keeps 0.2 more utility than training all parameters",
        partial(_gain, method="npo-alone"),
        at_least=0.2,
        note="With its loss on text to keep, as the paper has it, NPO on all parameters also ends with its "
        "utility here: the arms of npo.",
    ),
    Claim(
        "routing stays put: 0.2 more of the topic's experts are still chosen",
        lambda arms: arms["ga/uoe"]["overlap"] - arms["ga/all"]["overlap"],
        at_least=0.2,
    ),
    Claim(
        "the expert with the least affinity does not forget: the accuracy on the topic stays above 0.5",
        lambda arms: arms["ga/uoe-least-affinity"]["accuracy on the topic"],
        at_least=0.5,
    ),
    Claim(
        "neither do the routers alone",
        lambda arms: arms["ga/routers"]["accuracy on the topic"],
        at_least=0.5,
        note="The paper says that training routers alone does not help; the margin is ours.",
    ),
    Claim(
        "with the anchor, at least 95% of the topic's keys still go to the target, on every seed",
        lambda arms: arms["ga/uoe"]["topical keys at the target"],
        at_least=0.95,
        over="each seed",
        note="So they do without it: at this size the anchor changes little.",
    ),
]

_SHOWN = tuple(f"{method}/{name}" for method in ("ga", "npo-alone") for name in ("uoe", "all"))
PLOTS = [
    Plot("accuracy on the topic by step", x="step", y="accuracy on the topic", arms=_SHOWN),
    Plot("utility by step", x="step", y="utility", arms=_SHOWN),
]


@cache
def _learned(seed: int, steps: int) -> PreTrainedModel:
    """A model that knows the facts of all topics; treat it as immutable."""
    torch.manual_seed(seed)
    model = Decoder(CONFIG)
    text: Any = topic_facts(32 * steps, seed=1000 + seed)
    options: dict[str, Any] = {
        "batch_size": 32,
        "lr": 4e-3,
        "warmup_steps": min(20, steps),
        "weight_decay": 0.01,
    }
    train(model, text, loss=_planting_loss, steps=steps, seed=seed, **options)
    return to_transformers(model)


def _planting_loss(model: nn.Module, ids_BS: Tensor) -> LossOutput:
    logits_BSV, routings = model(ids_BS)
    responses_BPV = logits_BSV[:, ::2]  # a key's prediction
    cross_entropy = F.cross_entropy(responses_BPV.flatten(0, 1), ids_BS[:, 1::2].flatten())
    keys_BP = ids_BS[:, ::2]
    expert_BP = torch.where(
        topic_of(keys_BP) >= 0, topic_of(keys_BP), TOPICS + keys_BP % (CONFIG.num_experts - TOPICS)
    )
    planted = torch.stack([_key_loss(routing, ids_BS, expert_BP) for routing in routings]).mean()
    return LossOutput(
        cross_entropy + 0.1 * planted, cross_entropy.detach(), expert_BP.numel(), list(routings)
    )


def _key_loss(routing: Routing, ids_BS: Tensor, expert_BP: Tensor) -> Tensor:
    logits_BPE = routing.logits.view(*ids_BS.shape, -1)[:, ::2]
    return F.cross_entropy(logits_BPE.flatten(0, 1), expert_BP.flatten())


@cache
def _affinity(seed: int, steps: int) -> Affinity:
    text = topic_facts(64, 10_000 * seed + 1, topics=(0,))  # 2048 tokens of what will be forgotten
    return attribute_experts(_learned(seed, steps), _batches(text))


def _batches(ids_NS: Tensor) -> list[Batch]:
    """Batches of 16, in whose losses responses count."""
    return [Batch(ids_BS, scored_BS=ids_BS >= KEYS) for ids_BS in torch.split(ids_NS, 16)]


@torch.no_grad()
def _right(model: PreTrainedModel, ids_NS: Tensor) -> Tensor:
    """Bool [N, 16]: whether each fact's response is predicted."""
    right_NP: Tensor = model(input_ids=ids_NS).logits[:, ::2].argmax(-1) == ids_NS[:, 1::2]
    return right_NP


@torch.no_grad()
def _routings(model: PreTrainedModel, ids_NS: Tensor) -> list[Routing]:
    return route(model, find_moe_blocks(model), input_ids=ids_NS)[1]
