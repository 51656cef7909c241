"""How many bits each expert needs, by an exact integer program; and how many experts each token needs.

*published*: the statistics of Mixtral-8x7B's layers 0 and 15, as its authors ship them, with three budgets
each: the program must choose the bits that they ship.

*two-bits* and *three-halves*: a Qwen3-MoE of two layers, 64 wide, 16 SwiGLU experts of width 64, top-2,
trained for 1200 steps of 32 sequences on text of eight Markov chains over one alphabet (cross-entropy 1.534
at best). Experts are chosen and rounded on 64 sequences of 33 tokens and tested on 256 others, in both of
which the first domain is common and the eighth is rare: domain z with odds 1/(z+1). Rounding is to nearest in
groups of 32 columns, so that arms differ in their bits alone; GPTQ, with 11 of the paper's 100 scales, is
measured beside it. Attention stays in 32 bits; the paper rounds it to 4. *whole-model* solves one program for
both layers instead of one for each, which the paper does not measure. *uniform* gives all 2 bits, or 1.
*random* is the mean of 40 draws with 4 experts in 1 bit, 8 in 2 and 4 in 3, or with 10, 4 and 2, and of the
first five with GPTQ.

*top-any*: the same with experts of width 48, top-4, trained for 700 steps. One mask router per layer learns
for 150 steps how many of the four to keep, with the unpruned model as its teacher. The others keep as many
slots, *protected* a few more: *weight-ratio* is the rule of the predecessor, with its threshold set to do so,
and *protected* the same with all experts for the 2% of tokens that get most attention.

The paper compresses Mixtral and DeepSeek-VL2 and measures accuracy on benchmarks.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.data.domain_markov import DOMAINS, domain_markov
from coterie.hf import find_moe_blocks, recording
from coterie.reproduce import Budget, Card, Claim, Values
from coterie.reproduce.claims import Numbers
from coterie.reproduce.domain_lm import CONFIG, domain_lm, domain_loss
from coterie.shrink import (
    ExpertStatistics,
    PrefixMask,
    allocate_bits,
    allocate_model_bits,
    attention_received,
    block_inputs,
    expert_statistics,
    pack_block,
    protected,
    quantize_block,
    random_mask,
    ratio_threshold,
    top_any,
    train_top_any,
    weight_ratio,
)
from coterie.shrink.top_any import Mask

CARD = Card(
    slug="mc-sharp",
    title="MC#: Mixture Compressor for Mixture-of-Experts Large Models",
    authors="Huang et al.",
    year=2025,
    venue="arXiv 2510.10962",
    area="language",
    methods=("mixed-precision quantisation", "integer program", "GPTQ", "online expert pruning"),
    problem="All experts must be in memory although few run per token: which can do with 1, 2 or 3 bits?",
    headline="DeepSeek-VL2 in a 6.2th of its bytes, at 2.57 bits a weight, loses 1.7% on average over five "
    "multimodal benchmarks; pruning per token removes over 20% of expert activations for less than 1%.",
    code="https://github.com/Aaronhuang-778/MC-MoE",
)

STEPS = {"smoke": (5, 5, 3), "standard": (1200, 700, 150), "full": (2400, 1400, 300)}  # bits, top-any, masks
GROUP = 32
SEARCH = {"factors": torch.linspace(0.9, 1.1, 11).tolist(), "norm": 2.4}
SPARSITY = (0.05, 0.2)
PRUNERS = ("learned", "random-first-stays", "random", "weight-ratio", "protected")
ALLOCATIONS = ("mc-sharp", "whole-model", "random", "uniform", "error-only")

# counts, sums of router weights and errors in 1, 2, 3 bits of Mixtral-8x7B's eight experts; bits by budget
PUBLISHED = {
    "layer 0": (
        (68862, 63387, 62746, 63751, 66314, 70431, 56466, 72331),
        (19891.6, 22812.2, 21595.7, 21344.5, 19124.0, 16804.9, 17566.2, 18464.9),
        (
            (455.0, 180.4, 78.207),
            (3856.1, 708.03, 369.99),
            (735.98, 372.66, 156.33),
            (663.2, 341.52, 143.51),
            (525.43, 273.92, 114.71),
            (434.18, 218.07, 92.067),
            (3275.4, 677.75, 288.98),
            (450.27, 231.79, 97.39),
        ),
        {12: (1, 3, 2, 1, 1, 1, 2, 1), 16: (2, 3, 2, 2, 2, 1, 3, 1), 20: (2, 3, 3, 3, 2, 2, 3, 2)},
    ),
    "layer 15": (
        (57215, 75579, 71096, 41404, 68277, 71485, 73259, 65973),
        (16520.2, 20950.1, 21696.0, 13733.5, 19519.8, 22127.4, 22578.1, 21265.4),
        (
            (8985.3, 7735.3, 3187.4),
            (9444.3, 8232.2, 3396.1),
            (10683.0, 9034.2, 3739.5),
            (9922.8, 7955.6, 3233.4),
            (9709.2, 8293.3, 3418.2),
            (9970.2, 8359.2, 3467.8),
            (10261.0, 8838.6, 3664.7),
            (10844.0, 9325.0, 3852.9),
        ),
        {12: (1, 1, 2, 1, 1, 2, 3, 1), 16: (1, 2, 3, 1, 1, 3, 3, 2), 20: (2, 3, 3, 1, 2, 3, 3, 3)},
    ),
}


def published(seed: int, budget: Budget, data: Any) -> Values:
    """Experts that get the bits that the authors' files give them, of 8 in 2 layers with 3 budgets."""
    equal = 0
    for name, (counts, weights, errors, shipped) in PUBLISHED.items():
        given = ExpertStatistics(name, torch.tensor(counts), torch.tensor(weights), torch.tensor(errors))
        for bits, expected in shipped.items():
            chosen = allocate_bits(given, bits / 8)
            equal += sum(a == b for a, b in zip(chosen, expected, strict=True))
    return {"experts with the published bits, of 48": float(equal)}


def bits(seed: int, budget: Budget, data: Any, *, method: str, average: float) -> Values:
    """Loss with these bits per expert on average, rounded to nearest and by GPTQ."""
    plans = _plans(seed, budget, method, average)
    return {
        "loss, 32 bits": _loss(seed, budget, None),
        "loss": statistics.fmean(_loss(seed, budget, plan) for plan in plans),
        "loss, GPTQ": statistics.fmean(_loss(seed, budget, plan, "gptq") for plan in plans[:5]),
        "bits": statistics.fmean(b for plan in plans for widths in plan for b in widths),
        "bits, first layer": statistics.fmean(b for plan in plans for b in plan[0]),
    }


def pruning(seed: int, budget: Budget, data: Any, *, method: str) -> Values:
    """Loss when fewer of the four experts run."""
    return _pruned(seed, budget)[method]


ARMS = {
    "published/program": published,
    **{f"two-bits/{m}": partial(bits, method=m, average=2.0) for m in ALLOCATIONS},
    **{f"three-halves/{m}": partial(bits, method=m, average=1.5) for m in ALLOCATIONS},
    **{f"top-any/{m}": partial(pruning, method=m) for m in PRUNERS},
}


def _kept(arms: Numbers, method: str, what: str = "loss, λ=0.05") -> float:
    return arms[f"top-any/{method}"][what]


CLAIMS = [
    Claim(
        "the program gives all 48 experts the published bits",
        lambda arms: arms["published/program"]["experts with the published bits, of 48"],
        at_least=48,
        budget="smoke",
    ),
    Claim(
        "with 2 bits per expert on average, its loss is 0.03 nats or more below that of random bits",
        lambda arms: arms["two-bits/random"]["loss"] - arms["two-bits/mc-sharp"]["loss"],
        at_least=0.03,
        note="At the margin. A first run, with the five random draws that had been planned, measured 0.0286; "
        "one draw varies by 0.015, so 40 are taken since. They measure 0.0299, and 40 others on the same "
        "models, in a trial, 0.0319. With GPTQ, and the first five draws, the difference is 0.009.",
    ),
    Claim(
        "with 1.5 bits, its loss is 0.15 nats or more below that of 1 bit for all",
        lambda arms: arms["three-halves/uniform"]["loss"] - arms["three-halves/mc-sharp"]["loss"],
        at_least=0.15,
    ),
    Claim(
        "GPTQ does not lose to rounding to nearest at the same 2 bits",
        lambda arms: arms["two-bits/mc-sharp"]["loss"] - arms["two-bits/mc-sharp"]["loss, GPTQ"],
        at_least=0,
    ),
    Claim(
        "with λ=0.05, learned masks keep at most 80% of expert activations",
        lambda arms: _kept(arms, "learned", "kept, λ=0.05"),
        at_most=0.8,
    ),
    Claim(
        "at a loss at most 0.02 nats above that of all experts",
        lambda arms: _kept(arms, "learned") - _kept(arms, "learned", "loss, all"),
        at_most=0.02,
    ),
    Claim(
        "0.02 nats or more below random pruning that keeps the first expert and as many others",
        lambda arms: _kept(arms, "random-first-stays") - _kept(arms, "learned"),
        at_least=0.02,
    ),
    Claim(
        "and 0.2 nats or more below random pruning of any",
        lambda arms: _kept(arms, "random") - _kept(arms, "learned"),
        at_least=0.2,
    ),
]


def _skewed(count: int, seed: int) -> Tensor:
    """Sequences whose domain z has odds 1/(z+1)."""
    odds = 1 / np.arange(1, DOMAINS + 1)
    counts = np.random.default_rng(seed).multinomial(count, odds / odds.sum())
    parts = [domain_markov(int(n), seed + z, domain=z) for z, n in enumerate(counts) if n]
    return torch.cat(parts)


def _model(seed: int, budget: Budget) -> PreTrainedModel:
    config = replace(CONFIG, layers=1, num_experts=8) if budget == "smoke" else CONFIG
    return domain_lm(seed, STEPS[budget][0], config)


def _texts(seed: int, budget: Budget) -> tuple[Tensor, Tensor]:
    """To calibrate on, without each last token, and to test on."""
    return _skewed(64, 10_000 * seed + 100)[:, :-1], _skewed(
        8 if budget == "smoke" else 256, 10_000 * seed + 200
    )


@cache
def _statistics(seed: int, budget: Budget) -> list[ExpertStatistics]:
    model, (seen, _) = _model(seed, budget), _texts(seed, budget)
    return [
        expert_statistics(block, block_inputs(model, block, [seen]), group_size=GROUP)
        for block in find_moe_blocks(model)
    ]


def _plans(seed: int, budget: Budget, method: str, average: float) -> list[list[list[int]]]:
    """Bits of each expert of each layer; several plans where they are drawn."""
    found = _statistics(seed, budget)
    experts = len(found[0].frequency)
    if method == "uniform":
        return [[[int(average)] * experts for _ in found]]
    if method == "random":
        rng = np.random.default_rng(seed)
        ones, threes = (experts // 4, experts // 4) if average == 2 else (5 * experts // 8, experts // 8)
        some = [1] * ones + [2] * (experts - ones - threes) + [3] * threes
        return [
            [rng.permutation(some).tolist() for _ in found] for _ in range(1 if budget == "smoke" else 40)
        ]
    if method == "whole-model":
        return [allocate_model_bits(found, average)]
    exponents = {"alpha": 0.0, "beta": 0.0} if method == "error-only" else {}
    return [[allocate_bits(one, average, **exponents) for one in found]]


def _loss(seed: int, budget: Budget, plan: list[list[int]] | None, rounding: Any = "rtn") -> float:
    model, (seen, tested) = _model(seed, budget), _texts(seed, budget)
    options: dict[str, Any] = {"factors": (1.0,)} if budget == "smoke" or rounding == "rtn" else SEARCH
    for block, widths in zip(find_moe_blocks(model), plan or [], strict=plan is not None):
        inputs_TD = block_inputs(model, block, [seen])
        pack_block(
            model, block, *quantize_block(block, inputs_TD, widths, rounding, group_size=GROUP, **options)
        )
    return domain_loss(model, tested)


@cache
def _pruned(seed: int, budget: Budget) -> dict[str, dict[str, float]]:
    """method → its numbers. The others keep as many slots as the learned masks of the same λ."""
    _, steps, mask_steps = STEPS[budget]
    model = domain_lm(seed, steps, replace(CONFIG, top_k=4, expert_hidden=48))
    tested = domain_markov(8 if budget == "smoke" else 256, seed=10_000 * seed + 300)
    texts = torch.split(domain_markov(32 * mask_steps, seed=10_000 * seed + 400)[:, :-1], 32)
    model.set_attn_implementation("eager")  # which gives attention weights
    blocks = find_moe_blocks(model)
    with recording(blocks) as records, torch.no_grad():
        model(torch.cat(texts[:2]))
    weights = [record.weights for record in records]
    full = domain_loss(model, tested)
    numbers: dict[str, dict[str, float]] = {method: {"loss, all": full} for method in PRUNERS}

    def measure(method: str, sparsity: float, masks: Sequence[Mask]) -> float:
        with top_any([b.bank for b in blocks], masks, renormalize=True) as kept:
            numbers[method][f"loss, λ={sparsity:g}"] = domain_loss(model, tested)
        ratio = statistics.fmean(k.ratio for k in kept)
        numbers[method][f"kept, λ={sparsity:g}"] = ratio
        return ratio

    for sparsity in SPARSITY:
        ratio = measure("learned", sparsity, _learned(model, texts, sparsity, seed))
        draw = torch.Generator().manual_seed(seed)
        for method, first in (("random-first-stays", True), ("random", False)):
            measure(method, sparsity, [random_mask(ratio, draw, keep_first=first)] * len(blocks))
        rules = [weight_ratio(ratio_threshold(w, ratio)) for w in weights]
        measure("weight-ratio", sparsity, rules)
        with attention_received([block.layer for block in blocks]) as received:
            masks = [protected(rule, one) for rule, one in zip(rules, received, strict=True)]
            measure("protected", sparsity, masks)
    return numbers


def _learned(
    model: PreTrainedModel, texts: Sequence[Tensor], sparsity: float, seed: int
) -> Sequence[PrefixMask]:
    torch.manual_seed(seed)
    blocks = find_moe_blocks(model)
    masks = [PrefixMask(CONFIG.dim, block.top_k) for block in blocks]
    banks = [block.bank for block in blocks]
    train_top_any(model, banks, masks, model, texts, renormalize=True, sparsity=sparsity)
    return masks
