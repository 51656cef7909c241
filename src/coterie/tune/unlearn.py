"""Unlearning: a topic is taken out of the expert that knows it most, and the router holds its tokens there.

result = unlearn(model, forget, retain, method="npo", evaluate=accuracies, stop_at=0.05)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.hf import MoEBlock, find_moe_blocks, route
from coterie.nn import Routing
from coterie.nn.balance import router_anchor
from coterie.tune.attribute import Target, attribute_experts
from coterie.tune.batch import Batch
from coterie.tune.losses import METHODS, Given, Objective, control_vector, objective
from coterie.tune.trainable import (
    RouterScope,
    Slice,
    Weights,
    all_experts,
    all_routers,
    expert_slices,
    trainable,
)

SCOPES = ("expert", "experts", "router", "all")
"""What is trained: the target and its router (UOE); or, to compare, all experts, all routers, everything."""

FORGET = "forget"
"""The key of the number that `stop_at` is about, in what `evaluate` returns."""


@dataclass(frozen=True)
class Step:
    """One step of training, or an evaluation before the first.

    Args:
        step: from 1; 0 before training.
        forget: loss on the batch to forget; NaN at step 0, like the others.
        retain: loss on the batch to keep, without its weight; 0 where the method has none.
        anchor: router anchor loss, without its weight.
        measured: what `evaluate` returned after this step; empty where it was not asked.
    """

    step: int
    forget: float = math.nan
    retain: float = math.nan
    anchor: float = math.nan
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unlearning:
    """How a model was made to forget.

    Args:
        targets: the experts that were unlearned; those that would have been, where the scope is another.
        trained: numbers that were trained.
        trained_share: of all parameters.
        history: one entry per step, and one before the first if there was an `evaluate`.
        reached: whether it ended because the forget level was reached.
    """

    targets: list[Target]
    trained: int
    trained_share: float
    history: list[Step]
    reached: bool


def unlearn(
    model: PreTrainedModel,
    forget: Sequence[Batch],
    retain: Sequence[Batch] = (),
    *,
    method: str = "ga",
    scope: str = "expert",
    targets: Sequence[Target] | None = None,
    steps: int = 60,
    lr: float | None = None,
    alpha: float = 1.0,
    anchor_on: Literal["topk", "softmax"] = "topk",
    router: RouterScope = "layer",
    beta: float = 0.1,
    steer: float = 6.5,
    retain_weight: float | None = None,
    grad_clip: float = 1.0,
    evaluate: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    evaluate_every: int = 10,
    stop_at: float | None = None,
    seed: int = 0,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Unlearning:
    """Trains a model in place to forget a text, with AdamW without weight decay.

    Gradient ascent has no end: with nothing to stop it, everything is forgotten. Give `evaluate` and
    `stop_at`, and compare methods where they have forgotten as much. No balance loss is added: it would work
    against the anchor.

    Args:
        model: with MoE blocks; left in evaluation mode, in which it is trained: no dropout.
        forget: batches of the text to forget; one per step, in order, again and again.
        retain: the same of text to keep, for methods that have a loss on it.
        method: one of METHODS; see `coterie.tune.losses.objective`, as for beta and retain_weight.
        scope: one of SCOPES.
        targets: experts to unlearn; None takes the one with the most affinity to `forget`.
        steps: at most.
        lr: learning rate; None for 1e-4 in the scope "expert" and 5e-5 in the others.
        alpha: weight of the router anchor, in the scope "expert".
        anchor_on: see `coterie.nn.balance.router_anchor`.
        router: "layer": the gate matrix of a target's block is trained; "row": the target's row of it.
        beta: of npo.
        steer: of rmu: length of the control vector, as a multiple of the mean length of the residual stream.
        retain_weight: λ.
        grad_clip: largest norm of the gradient.
        evaluate: from the model to numbers to record, "forget" among them if there is a `stop_at`.
        evaluate_every: how many steps lie between; the first is before training, the last after.
        stop_at: end when the number "forget" is at or below it.
        seed: of rmu's direction.
        on_step: called after each step.

    Returns how it went. A target that is not in the top-k of any token gets no gradient but the anchor's.

    Raises ValueError if there is nothing to forget, or to keep where the method needs it, the two are the
    same, an argument is unknown or out of range, or a loss is not finite; that step is not taken.

    Source: UOE (2024, arXiv 2411.18797), sections 3 and 4.
    """
    blocks = find_moe_blocks(model)
    _check(forget, retain, method, retain_weight, scope, steps, evaluate, evaluate_every, stop_at)
    model.train(False)
    if targets is None:
        targets = attribute_experts(model, forget, blocks).top()
    chosen = expert_slices(model, blocks, targets, router=router)  # which also checks them
    slices = {
        "expert": lambda: chosen,
        "experts": lambda: all_experts(model, blocks),
        "router": lambda: all_routers(model, blocks),
        "all": lambda: [Slice(p) for p in model.parameters()],
    }[scope]()
    total = sum(p.numel() for p in model.parameters())
    rate = lr if lr is not None else 1e-4 if scope == "expert" else 5e-5
    look = _Look(model, blocks, targets)
    anchor = (alpha, anchor_on) if scope == "expert" and alpha else None
    history: list[Step] = []

    def record(step: Step, due: bool) -> bool:
        """Adds a step to the history; says whether the forget level is reached."""
        measured = dict(evaluate(model)) if evaluate is not None and due else {}
        history.append(Step(**{**vars(step), "measured": measured}))
        if step.step:
            on_step(history[-1])
        if stop_at is not None and measured and FORGET not in measured:
            raise ValueError(f"evaluate returned {', '.join(measured)}; stop_at needs the number {FORGET!r}")
        return stop_at is not None and bool(measured) and measured[FORGET] <= stop_at

    with trainable(model, slices) as weights:
        optimizer = torch.optim.AdamW(weights.parameters, lr=rate, weight_decay=0.0)
        losses = _objective(look, forget[0], method, beta, steer, retain_weight, seed)
        compares = losses.forget_compares or losses.retain_compares
        original = weights.snapshot() if compares else []
        reached = evaluate is not None and record(Step(0), due=True)
        number = 0
        while number < steps and not reached:
            number += 1
            batch = forget[(number - 1) % len(forget)]
            kept = retain[(number - 1) % len(retain)] if losses.retain is not None else None
            terms = _backward(look, weights, losses, original, (batch, kept), anchor)
            step = Step(number, *terms)
            if not all(map(math.isfinite, terms)):
                raise ValueError(
                    f"step {number}: the losses are {_told(step)}; use a smaller lr than {rate:g}"
                )
            weights.collect()
            nn.utils.clip_grad_norm_(weights.parameters, grad_clip)
            optimizer.step()
            weights.write()
            reached = record(step, due=number % evaluate_every == 0 or number == steps)
    return Unlearning(list(targets), weights.count, weights.count / total, history, reached)


class _Look:
    """Forward passes of one model, with the decisions of the targets' blocks."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[MoEBlock], targets: Sequence[Target]) -> None:
        self.model = model
        self.layers = sorted({target.layer for target in targets})
        self.experts = [[t.expert for t in targets if t.layer == layer] for layer in self.layers]
        self.blocks = [blocks[layer] for layer in self.layers]

    def __call__(self, batch: Batch) -> tuple[Given, list[Routing]]:
        found: list[Tensor] = []

        def after_layer(module: Any, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handle = self.blocks[-1].layer.register_forward_hook(after_layer)
        try:
            output, routings = route(self.model, self.blocks, **batch.inputs())
        finally:
            handle.remove()
        return Given(output.logits, found[-1]), routings


def _backward(
    look: _Look,
    weights: Weights,
    losses: Objective,
    original: Sequence[Tensor],
    pair: tuple[Batch, Batch | None],
    anchor: tuple[float, Literal["topk", "softmax"]] | None,
) -> tuple[float, float, float]:
    """Gradients of one step; returns its losses: forget, retain, anchor."""
    forget, retain = (None if batch is None else batch.to(look.model.device) for batch in pair)
    assert forget is not None
    # the model as it was is the same model with the slices as they were: no second one is in memory
    with weights.replaced(original) if original else nullcontext(), torch.no_grad():
        before_forget = look(forget)[0] if losses.forget_compares else None
        before_retain = look(retain)[0] if losses.retain_compares and retain is not None else None
    now, routings = look(forget)
    first = loss = losses.forget(now, before_forget, forget)
    pull = loss.new_zeros(())
    if anchor is not None:
        alpha, on = anchor
        tokens_T = None if forget.anchored_BS is None else forget.anchored_BS.flatten()
        each = [
            router_anchor(routing, experts, on=on, tokens_T=tokens_T)
            for routing, experts in zip(routings, look.experts, strict=True)
        ]
        pull = torch.stack(each).mean()
        loss = loss + alpha * pull
    loss.backward()  # type: ignore[no-untyped-call]
    kept = 0.0
    if losses.retain is not None and retain is not None:
        # on its own, so that one graph is in memory at a time; gradients add up
        second = losses.retain(look(retain)[0], before_retain, retain)
        (losses.retain_weight * second).backward()  # type: ignore[no-untyped-call]
        kept = second.item()
    return first.item(), kept, pull.item()


def _objective(
    look: _Look,
    batch: Batch,
    method: str,
    beta: float,
    steer: float,
    retain_weight: float | None,
    seed: int,
) -> Objective:
    control_D = None
    if method == "rmu":
        with torch.no_grad():
            batch = batch.to(look.model.device)
            control_D = control_vector(look(batch)[0].hidden_BSD, batch, scale=steer, seed=seed)
    return objective(method, beta=beta, control_D=control_D, retain_weight=retain_weight)


def _check(
    forget: Sequence[Batch],
    retain: Sequence[Batch],
    method: str,
    retain_weight: float | None,
    scope: str,
    steps: int,
    evaluate: Any,
    evaluate_every: int,
    stop_at: float | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; use one of {', '.join(METHODS)}")
    if scope not in SCOPES:
        raise ValueError(f"no scope {scope!r}; use one of {', '.join(SCOPES)}")
    if steps < 1 or evaluate_every < 1:
        raise ValueError(f"steps={steps} and evaluate_every={evaluate_every}; both should be at least 1")
    if not forget:
        raise ValueError("there is no text to forget; give at least one batch")
    if method != "ga" and retain_weight != 0 and not retain:
        raise ValueError(f"{method} has a loss on text to keep; give some, or use ga")
    if len(forget) == len(retain) and all(
        torch.equal(f.ids_BS, r.ids_BS) for f, r in zip(forget, retain, strict=True)
    ):
        raise ValueError("the text to forget and the text to keep are the same")
    if stop_at is not None and evaluate is None:
        raise ValueError(f"stop_at={stop_at} needs evaluate, which returns the number {FORGET!r}")


def _told(step: Step) -> str:
    return f"forget {step.forget:g}, retain {step.retain:g}, anchor {step.anchor:g}"
