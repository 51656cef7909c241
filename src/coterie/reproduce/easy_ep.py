"""Half of a model's experts for one domain, found from 25 texts; and why the score has three factors.

*domains*: a Qwen3-MoE of two layers, 64 wide, 16 SwiGLU experts of width 64, top-2, trained for 1200 steps
of 32 sequences on text of eight Markov chains over one alphabet (cross-entropy 1.534 at best). For each
domain, 25 sequences of 33 tokens score the experts, and 8 or 4 are kept in each layer, the others deleted.
The loss is measured on 64 new sequences of that domain and of the next one. The texts are drawn from the
chain; in the paper the model answers questions itself. Merging by M-SMoE, with
one router row per group, is there to compare. *demonstrations* compares what 5 and 25 texts choose. *speed*
is measured on forward passes of 256 sequences: a token still goes to two experts, so little can be won.

*factors*: one random layer of 32 experts, top-4, whose experts differ in the length of what they give, on
tokens of which half sit on a residual stream eight times longer than the others. 8 experts are kept, tokens
are routed as before (`no_reroute`), and drift is the mean of 1 - cos(full, pruned) of the layer's output over
1500 new tokens. The layer is that of a real Qwen3-MoE, which normalises the residual stream before it.

The paper prunes DeepSeek-R1 with 256 experts a layer, and measures accuracy on benchmarks.
"""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from coterie.data.domain_markov import DOMAINS, domain_markov
from coterie.hf import BlockRecord, MoEBlock, find_moe_blocks, interleaved_speed, recording
from coterie.reproduce import Budget, Card, Claim, Plot, Values
from coterie.reproduce.claims import Numbers
from coterie.reproduce.domain_lm import domain_lm, domain_loss
from coterie.shrink import choose, m_smoe, no_reroute, overlap, pruned

CARD = Card(
    slug="easy-ep",
    title="Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations",
    authors="Dong et al.",
    year=2025,
    venue="NeurIPS 2025",
    area="language",
    methods=("expert pruning", "few-shot expert localisation", "calibration", "checkpoint compression"),
    problem="Which half of the experts can go, when a model serves one domain and a few examples are known?",
    headline="DeepSeek-R1 with 128 of 256 experts a layer: 66.55 on average over 8 benchmarks against 67.20, "
    "at 2.99 times the throughput in the same memory; keeping experts by gating score gives 56.49.",
    code="https://github.com/RUCAIBox/EASYEP",
)

STEPS = {"smoke": 5, "standard": 1200, "full": 2400}
KEEPS = (8, 4)
LAYERS = 10  # random layers per seed
M_SMOE = "m-smoe"


def localise(seed: int, budget: Budget, data: Any, *, method: str) -> Values:
    """Keeps experts for each domain in turn, and tests that domain and the next; means over the domains."""
    smoke = budget == "smoke"
    model = domain_lm(seed, STEPS[budget])
    blocks = find_moe_blocks(model)
    tested, rows = 4 if smoke else 64, []
    for domain in range(1 if smoke else DOMAINS):
        draw = 10_000 * seed + 10 * domain
        inside = domain_markov(tested, seed=draw + 1, domain=domain)
        outside = domain_markov(tested, seed=draw + 2, domain=(domain + 1) % DOMAINS)
        row = {"loss, all experts": domain_loss(model, inside)}
        records = _record(model, blocks, domain_markov(25, seed=draw, domain=domain))
        for keep in KEEPS:
            with _smaller(blocks, records, method, keep, draw):
                row[f"loss, {keep} of 16"] = domain_loss(model, inside)
                row[f"next domain, {keep} of 16"] = domain_loss(model, outside)
        rows.append(row)
    means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    curve = [(float(keep), means[f"loss, {keep} of 16"]) for keep in sorted(KEEPS)]
    return {**means, "loss by experts": [*curve, (16.0, means["loss, all experts"])]}


def few(seed: int, budget: Budget, data: Any) -> Values:
    """How far fewer demonstrations lead to the same half of the experts as 25 others."""
    smoke = budget == "smoke"
    model = domain_lm(seed, STEPS[budget])
    blocks = find_moe_blocks(model)
    curve = []
    for count in (5, 25) if smoke else (1, 2, 5, 10, 25):
        shares = []
        for domain in range(1 if smoke else DOMAINS):
            text = domain_markov(25, seed=10_000 * seed + 10 * domain, domain=domain)
            some, all_25 = (_chosen(blocks, _record(model, blocks, ids), 8) for ids in (text[:count], text))
            shares.append(overlap(some, all_25))
        curve.append((float(count), statistics.fmean(shares)))
    return {"overlap of 5 with 25": dict(curve)[5.0], "overlap by demonstrations": curve}


def throughput(seed: int, budget: Budget, data: Any) -> Values:
    """Tokens per second of forward passes, all experts and half of them by turns."""
    model = domain_lm(seed, STEPS[budget])
    blocks = find_moe_blocks(model)
    kept = _chosen(blocks, _record(model, blocks, domain_markov(25, seed=seed, domain=0)), 8)
    ids = domain_markov(4 if budget == "smoke" else 256, seed=1, domain=0)
    speeds = interleaved_speed(model, partial(pruned, blocks, kept), ids)
    return {"tokens/s, all experts": speeds[0], "tokens/s, 8 of 16": speeds[1]}


def factors(seed: int, budget: Budget, data: Any, *, method: str) -> Values:
    """Drift of random layers whose experts were chosen by one score; means over the layers."""
    drifts = [_drift(LAYERS * seed + i, method) for i in range(1 if budget == "smoke" else LAYERS)]
    gating = [_drift(LAYERS * seed + i, "gating") for i in range(len(drifts))]
    return {
        "drift": statistics.fmean(d["tokens stay"] for d in drifts),
        "drift, rerouted": statistics.fmean(d["rerouted"] for d in drifts),
        "share of layers better than gating": statistics.fmean(
            d["tokens stay"] < g["tokens stay"] for d, g in zip(drifts, gating, strict=True)
        ),
        "tokens without an expert": statistics.fmean(d["unserved"] for d in drifts),
    }


ARMS = {
    **{f"domains/{m}": partial(localise, method=m) for m in ("easy-ep", "gating", "frequency", "reap")},
    "domains/random": partial(localise, method="random"),
    "domains/m-smoe": partial(localise, method=M_SMOE),
    "demonstrations/easy-ep": few,
    "speed/easy-ep": throughput,
    **{
        f"factors/{m}": partial(factors, method=m)
        for m in ("easy-ep", "gating-norm", "gating-token", "gating", "frequency", "random")
    },
}


def _half(arms: Numbers, method: str) -> float:
    return arms[f"domains/{method}"]["loss, 8 of 16"]


CLAIMS = [
    Claim(
        "with the half of the experts that easy-ep keeps, the loss is 0.4 nats or more below a random half's",
        lambda arms: _half(arms, "random") - _half(arms, "easy-ep"),
        at_least=0.4,
    ),
    Claim(
        "that half is bound to its domain: on the next one the loss is at least 0.4 nats higher",
        lambda arms: arms["domains/easy-ep"]["next domain, 8 of 16"] - _half(arms, "easy-ep"),
        at_least=0.4,
    ),
    Claim(
        "its loss is at most 0.05 nats above that of the half with the highest gating score",
        lambda arms: _half(arms, "easy-ep") - _half(arms, "gating"),
        at_most=0.05,
        note="At this size the gating score is nearly as good; the factors are tested by themselves.",
    ),
    Claim(
        "5 demonstrations find at least 80% of the experts that 25 find",
        lambda arms: arms["demonstrations/easy-ep"]["overlap of 5 with 25"],
        at_least=0.8,
    ),
    Claim(
        "easy-ep drifts at most 0.3 times as far as gating",
        lambda arms: arms["factors/easy-ep"]["drift"] / arms["factors/gating"]["drift"],
        at_most=0.3,
    ),
    Claim(
        "easy-ep is better than gating in at least 9 of 10 layers, on every seed",
        lambda arms: arms["factors/easy-ep"]["share of layers better than gating"],
        at_least=0.9,
        over="each seed",
    ),
    Claim(
        "easy-ep drifts no farther than the score without the token's movement",
        lambda arms: arms["factors/easy-ep"]["drift"] / arms["factors/gating-norm"]["drift"],
        at_most=1,
    ),
    Claim(
        "easy-ep drifts no farther than the score without the length of the output",
        lambda arms: arms["factors/easy-ep"]["drift"] / arms["factors/gating-token"]["drift"],
        at_most=1,
    ),
]

PLOTS = [
    Plot("loss by experts", x="experts kept in each layer", y="loss in the domain, nats per token"),
    Plot("overlap by demonstrations", x="demonstrations", y="share of the experts that 25 find", log_x=True),
]


def _record(model: PreTrainedModel, blocks: Sequence[MoEBlock], ids_NS: Tensor) -> list[BlockRecord]:
    with recording(blocks, keep_inputs=1024) as records, torch.no_grad():
        model(ids_NS)
    return records


def _chosen(
    blocks: Sequence[MoEBlock],
    records: Sequence[BlockRecord],
    keep: int,
    method: str = "easy-ep",
    seed: int = 0,
) -> list[list[int]]:
    pairs = enumerate(zip(blocks, records, strict=True))
    return [choose(block, [record], method, keep, seed=seed + i) for i, (block, record) in pairs]


@contextmanager
def _smaller(
    blocks: Sequence[MoEBlock], records: Sequence[BlockRecord], method: str, keep: int, seed: int
) -> Iterator[None]:
    """The model with `keep` experts in each layer, for a while."""
    if method != M_SMOE:
        with pruned(blocks, _chosen(blocks, records, keep, method, seed)):
            yield
        return
    with ExitStack() as trials:
        for block, record in zip(blocks, records, strict=True):
            trials.enter_context(block.trial())
            m_smoe(block, record, keep)
        yield


@cache
def _drift(seed: int, method: str) -> dict[str, float]:
    """Mean of 1 - cos(layer's output, output with 8 of 32 experts) over 1500 new tokens."""
    generator = torch.Generator().manual_seed(seed)
    model, centres_CD = _random_layer(generator), 1.2 * torch.randn(8, 64, generator=generator)
    seen, new = (_tokens(centres_CD, generator) for _ in range(2))
    blocks = find_moe_blocks(model)
    with recording(blocks) as records:
        _layer(model, seen)
    kept = _chosen(blocks, records, 8, method, seed)
    full_TD = _layer(model, new)
    with no_reroute(blocks, kept) as silenced:
        stay_TD = _layer(model, new)
    with pruned(blocks, kept):
        rerouted_TD = _layer(model, new)
    return {
        "tokens stay": _turned(full_TD, stay_TD),
        "rerouted": _turned(full_TD, rerouted_TD),
        "unserved": silenced[0].unserved / silenced[0].tokens,
    }


def _random_layer(generator: torch.Generator) -> PreTrainedModel:
    sizes: Any = {
        "vocab_size": 2,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    model.train(False)
    layer: Any = model.model.layers[0]
    block = find_moe_blocks(model)[0]
    scale_E = torch.randn(32, generator=generator).exp()
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()  # the residual stream is the embedding
        block.router.rows.normal_(std=2.5 / 8, generator=generator)
        for matrix in (block.experts.gate, block.experts.up):
            assert matrix is not None
            matrix.normal_(std=1 / 8, generator=generator)
        block.experts.down.normal_(std=32**-0.5, generator=generator)
        block.experts.down.mul_((scale_E / scale_E.mean()).view(-1, 1, 1))
    return model


def _tokens(centres_CD: Tensor, generator: torch.Generator, count: int = 1500) -> Tensor:
    """The residual stream: the first half is long, so that experts hardly turn it."""
    easy, hard = (torch.randint(first, first + 3, (count // 2,), generator=generator) for first in (0, 3))
    x_TD = centres_CD[torch.cat((easy, hard))]
    x_TD = F.normalize(x_TD + 0.6 * torch.randn(x_TD.shape, generator=generator), dim=-1) * 8
    return torch.cat((8 * x_TD[: count // 2], x_TD[count // 2 :]))


@torch.no_grad()
def _layer(model: Any, h_TD: Tensor) -> Tensor:
    # the norm after the last layer changes no direction
    output: Tensor = model.model(inputs_embeds=h_TD.unsqueeze(1)).last_hidden_state[:, 0]
    return output


def _turned(full_TD: Tensor, pruned_TD: Tensor) -> float:
    return (1 - F.cosine_similarity(full_TD.double(), pruned_TD.double(), dim=-1)).mean().item()
