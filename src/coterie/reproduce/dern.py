"""Half of the experts of an upcycled model: dropped, averaged, or recombined neuron by neuron.

Text of eight Markov chains over one alphabet. A dense decoder of two layers, 64 wide, SwiGLU of width 96,
learns for 300 steps of 32 sequences of 33 tokens. Then it becomes a mixture: each of 8 experts is a copy of
that SwiGLU with its neurons in another order and 30% of them new; top-2, 800 more steps. So experts share
neurons, but not in the same places. 128 sequences of all domains calibrate, 4 or 6 of 8 experts stay in each
layer, nothing is trained, and the loss is measured on 64 new sequences of each domain.

*position-wise* averages a dropped expert into the kept one with the most similar router logits, by
importance, without looking for the order of its neurons; *m-smoe* brings them into the same order first, and
averages router rows, too. *output-error* tries all ways to drop experts. The other arms change one thing in
*dern*, which deletes the router rows of dropped experts; *transfer* sends their tokens after their neurons.

*from-scratch* is a model of 16 experts of width 64 that was never dense, after 1200 steps: its experts share
nothing, so that at the paper's threshold no neuron moves. It tells where the method ends; no claim is on it.

The paper compresses Mixtral, Qwen2-57B and DeepSeek-MoE and measures accuracy.
"""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.data.domain_markov import DOMAINS, domain_markov
from coterie.hf import BlockRecord, ExpertTensors, MoEBlock, find_moe_blocks, recording
from coterie.models import Decoder, to_transformers
from coterie.nn import Router
from coterie.reproduce import Budget, Card, Claim, Plot, Values, train
from coterie.reproduce.claims import Numbers
from coterie.reproduce.domain_lm import CONFIG, domain_lm, domain_lm_loss, domain_loss
from coterie.shrink import choose, dern, gating, kept_experts, m_smoe
from coterie.shrink.merge import around_dominant, router_similarity
from coterie.shrink.segments import reordered
from coterie.shrink.transfer import rerouted, softmax_router, transferred

CARD = Card(
    slug="dern",
    title="Dropping Experts, Recombining Neurons: Retraining-Free Pruning for Sparse Mixture-of-Experts LLMs",
    authors="Zhou et al.",
    year=2025,
    venue="Findings of EMNLP 2025",
    area="language",
    methods=("expert pruning", "neuron recombination", "expert merging", "checkpoint compression"),
    problem="Can what dropped experts know be kept without training, where averaging whole experts fails?",
    headline="Mixtral with 4 of 8 experts: 70.79 on average over eight benchmarks, against 65.69 for "
    "dropping by output error and 42.49 for merging whole experts; 80.88 with all.",
)

EXPERTS, HIDDEN, NEW = 8, 96, 0.3
CONFIG = replace(CONFIG, num_experts=EXPERTS, expert_hidden=HIDDEN, hidden=HIDDEN)
STEPS = {"smoke": (3, 3), "standard": (300, 800), "full": (600, 2400)}
KEEPS = (4, 6)

# (block, its record, how many experts stay) → a router in place of the block's own, or None
Method = Callable[[MoEBlock, BlockRecord, int], Router | None]


def run(seed: int, budget: Budget, data: Any, *, method: Method) -> Values:
    """Makes the model smaller by one method, twice, and measures its loss each time."""
    text = _held_out(seed, budget)
    values: dict[str, Any] = {"loss, all experts": domain_loss(_upcycled(seed, budget)[0], text)}
    for keep in KEEPS:
        values[f"loss, {keep} of 8"] = _smaller_loss(seed, budget, text, method, keep)
    curve = [(float(keep), values[f"loss, {keep} of 8"]) for keep in KEEPS]
    return {**values, "loss by experts": [*curve, (float(EXPERTS), values["loss, all experts"])]}


def recombine(seed: int, budget: Budget, data: Any) -> Values:
    """`run` with DERN, and the loss with 4 of 8 experts by how similar a neuron must be to be moved."""
    values, text = run(seed, budget, data, method=_dern), _held_out(seed, budget)
    tried = (0.6,) if budget == "smoke" else (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    curve = [(t, _smaller_loss(seed, budget, text, partial(_dern, threshold=t), 4)) for t in tried]
    return {**values, "loss by threshold": curve}


def from_scratch(seed: int, budget: Budget, data: Any, *, threshold: float) -> Values:
    """Half of the experts of a model whose experts share no neurons; at threshold 1, dropping alone."""
    model, text = domain_lm(seed, 5 if budget == "smoke" else 1200), _held_out(seed, budget)
    blocks = find_moe_blocks(model)
    whole, records = domain_loss(model, text), _calibrate(model, blocks, seed, budget)
    done = [
        dern(block, gating(record), 8, threshold=threshold)
        for block, record in zip(blocks, records, strict=True)
    ]
    return {
        "loss, all 16 experts": whole,
        "loss, 8 of 16": domain_loss(model, text),
        "cosine with the most similar neuron": statistics.fmean(each.cosine for each in done),
        "neurons moved": statistics.fmean(each.moved for each in done),
    }


def _drop(block: MoEBlock, record: BlockRecord, keep: int) -> None:
    block.keep(kept_experts(gating(record), keep))


def _output_error(block: MoEBlock, record: BlockRecord, keep: int) -> None:
    block.keep(choose(block, [record], "output-error", keep))


def _position_wise(block: MoEBlock, record: BlockRecord, keep: int) -> None:
    importance_E = gating(record)
    members = around_dominant(router_similarity(block, record.inputs), importance_E, keep)
    router = block.router[[dominant for dominant, *_ in members]]
    block.merge(members, [importance_E[ids].tolist() for ids in members])
    block.replace(range(keep), router=router)


def _m_smoe(block: MoEBlock, record: BlockRecord, keep: int) -> None:
    m_smoe(block, record, keep)


def _dern(
    block: MoEBlock, record: BlockRecord, keep: int, *, transfer: bool = False, **options: Any
) -> Router | None:
    router = softmax_router(block, record) if transfer else None
    done = dern(block, gating(record) / len(record.experts), keep, **options)
    return None if router is None else transferred(router, done.transfer)


BASELINES: dict[str, Method] = {
    "drop": _drop,
    "output-error": _output_error,
    "position-wise": _position_wise,
    "m-smoe": _m_smoe,
}
ABLATIONS: dict[str, Method] = {
    "dern-transfer": partial(_dern, transfer=True),
    "dern-threshold-0": partial(_dern, threshold=0.0),
    "dern-random-init": partial(_dern, init="random"),
    "dern-gate-init": partial(_dern, init="gate"),
    "dern-unweighted": partial(_dern, weighted=False),
    "dern-gate-compared": partial(_dern, parts=("gate", "up", "down")),
}
ARMS = {
    "dern": recombine,
    **{name: partial(run, method=method) for name, method in (BASELINES | ABLATIONS).items()},
    "from-scratch/drop": partial(from_scratch, threshold=1.0),
    "from-scratch/dern": partial(from_scratch, threshold=0.6),
    "from-scratch/dern-threshold-0": partial(from_scratch, threshold=0.0),
}


def _above(arms: Numbers, other: str, keep: int = 4) -> float:
    """How far another method's loss lies above DERN's."""
    return arms[other][f"loss, {keep} of 8"] - arms["dern"][f"loss, {keep} of 8"]


CLAIMS = [
    Claim(
        "with half of the experts, recombining leaves the loss at least 0.03 nats below dropping",
        lambda arms: _above(arms, "drop"),
        at_least=0.03,
    ),
    Claim(
        "it stays at least 0.3 nats below averaging whole experts position by position",
        lambda arms: _above(arms, "position-wise"),
        at_least=0.3,
    ),
    Claim(
        "moving only neurons with a similar one is worth at least 0.01 nats against moving nearly all",
        lambda arms: _above(arms, "dern-threshold-0"),
        at_least=0.01,
    ),
    Claim(
        "starting from the kept expert's own neurons is worth at least 0.05 nats against random ones",
        lambda arms: _above(arms, "dern-random-init"),
        at_least=0.05,
    ),
    Claim(
        "with three quarters of the experts, recombining loses at most 0.005 nats on dropping",
        lambda arms: -_above(arms, "drop", keep=6),
        at_most=0.005,
    ),
]

PLOTS = [
    Plot(
        "loss by experts",
        x="experts kept in each layer",
        y="loss, nats per token",
        arms=("dern", "drop", "output-error", "position-wise", "m-smoe", "dern-transfer"),
    ),
    Plot(
        "loss by threshold",
        x="cosine that a neuron must have with the most similar one",
        y="loss with 4 of 8 experts, nats per token",
        note="At 1 nothing moves, and experts are only dropped.",
    ),
]


def _smaller_loss(seed: int, budget: Budget, text_NS: Tensor, method: Method, keep: int) -> float:
    model, blocks, records = _upcycled(seed, budget)
    with ExitStack() as trials:
        for block in blocks:
            trials.enter_context(block.trial())
        routers = [method(block, record, keep) for block, record in zip(blocks, records, strict=True)]
        replaced = [(b, r) for b, r in zip(blocks, routers, strict=True) if r is not None]
        trials.enter_context(rerouted([b for b, _ in replaced], [r for _, r in replaced]))
        return domain_loss(model, text_NS)


def _held_out(seed: int, budget: Budget) -> Tensor:
    each = 4 if budget == "smoke" else 64
    return torch.cat([domain_markov(each, seed=4000 + 10 * seed + d, domain=d) for d in range(DOMAINS)])


@cache
def _upcycled(seed: int, budget: Budget) -> tuple[PreTrainedModel, list[MoEBlock], list[BlockRecord]]:
    """A Qwen3-MoE of 8 experts that share most of their neurons, each in an order of its own.

    Returns: the model, its blocks, which must not stay changed, and what they do with the calibration text.
    """
    dense_steps, steps = STEPS[budget]
    torch.manual_seed(seed)
    dense = Decoder(replace(CONFIG, num_experts=0))
    _train(dense, dense_steps, seed=1000 + seed)
    moe = Decoder(CONFIG)
    shared = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    moe.load_state_dict(shared, strict=False)
    generator = torch.Generator().manual_seed(seed)
    for old, new in zip(dense.layers, moe.layers, strict=True):
        _upcycle(old.mlp, new.mlp.experts, generator)  # type: ignore[union-attr]
    _train(moe, steps, seed=2000 + seed)
    model = to_transformers(moe)
    blocks = find_moe_blocks(model)
    return model, blocks, _calibrate(model, blocks, seed, budget)


def _calibrate(
    model: PreTrainedModel, blocks: list[MoEBlock], seed: int, budget: Budget
) -> list[BlockRecord]:
    smoke = budget == "smoke"
    with recording(blocks, keep_inputs=64 if smoke else 1024) as records, torch.no_grad():
        model(domain_markov(4 if smoke else 128, seed=3000 + seed))
    return records


def _train(model: Decoder, steps: int, seed: int) -> None:
    options: dict[str, Any] = {"batch_size": 32, "lr": 4e-3, "warmup_steps": min(50, steps)}
    text: Any = domain_markov(32 * steps, seed=seed)
    train(model, text, loss=domain_lm_loss(), steps=steps, seed=seed, weight_decay=0.01, **options)


@torch.no_grad()
def _upcycle(mlp: Any, bank: Any, generator: torch.Generator) -> None:
    """Each expert becomes a copy of the dense layer, its neurons shuffled, a share NEW of them drawn anew."""
    matrices = [layer.weight for layer in (mlp.up_proj, mlp.down_proj, mlp.gate_proj)]
    dense = ExpertTensors(*(matrix.unsqueeze(0) for matrix in matrices))
    for expert in range(EXPERTS):
        copied = reordered(dense, torch.randperm(HIDDEN, generator=generator))
        fresh = torch.randperm(HIDDEN, generator=generator)[: round(NEW * HIDDEN)]
        up, down, gate = copied.up[0], copied.down[0], copied.gate[0]  # type: ignore[index]
        for rows in (gate, up, down.T):
            std = rows.std().item()
            rows[fresh] = std * torch.randn(len(fresh), rows.shape[1], generator=generator)
        bank.gate_up_proj[expert], bank.down_proj[expert] = torch.cat((gate, up)), down
