"""Unlearning: a topic is taken out of the expert that knows it most, and the router holds its tokens there.

result = unlearn(model, forget, retain, method="npo", evaluate=accuracies, stop_at=0.05)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from coterie.hf import find_moe_blocks
from coterie.train.interrupt import FinishOnInterrupt
from coterie.tune.attribute import Target, attribute_experts
from coterie.tune.batch import Batch
from coterie.tune.gradients import Look, backward, objective_of
from coterie.tune.history import FORGET, Step, Unlearning
from coterie.tune.kept import Kept, digest, digest_text
from coterie.tune.losses import METHODS
from coterie.tune.resume import keep_training, resume_training
from coterie.tune.trainable import SCOPES, RouterScope, scope_slices, snapshot, trainable


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
    keep: Kept | None = None,
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
        keep: where what is trained, its moments and the history are kept, and the search for targets. Called
            again after an interruption, with the model as it was at first, training goes on after the last
            step that was kept and ends with the same weights and history, to the bit where the machine
            computes so. `steps` and `stop_at` may then be others, `evaluate` should be the same. Ctrl-C ends
            it after the step, which is kept; a second one at once. None keeps nothing.
        on_step: called after each step, and first for the one that it goes on after.

    Returns how it went. A target that is not in the top-k of any token gets no gradient but the anchor's.

    Raises:
        ValueError: there is nothing to forget, or to keep where the method needs it, the two are the same, an
            argument is unknown or out of range; a loss is not finite, and that step is not taken; what was
            kept is of another model, text or option, or cannot be written.
        KeyboardInterrupt: Ctrl-C; the model is left as it was trained so far.

    Source: UOE (2024, arXiv 2411.18797), sections 3 and 4.
    """
    blocks = find_moe_blocks(model)
    _check(forget, retain, method, retain_weight, scope, steps, lr, evaluate, evaluate_every, stop_at)
    model.train(False)
    if targets is None:
        targets = attribute_experts(model, forget, blocks, keep=keep).top()
    slices = scope_slices(model, blocks, targets, scope, router=router)
    rate = lr if lr is not None else default_lr(scope)
    look = Look(model, blocks, targets)
    anchor = (alpha, anchor_on) if scope == "expert" and alpha else None
    run = {
        "method": method,
        "scope": scope,
        "targets": targets,
        "lr": rate,
        "alpha": alpha,
        "anchor_on": anchor_on,
        "router": router,
        "beta": beta,
        "steer": steer,
        "retain_weight": retain_weight,
        "grad_clip": grad_clip,
        "evaluate_every": evaluate_every,
        "seed": seed,
    }
    if keep is not None:
        run |= {"the text to forget": digest_text(forget), "the text to keep": digest_text(retain)}
        run["the weights before training"] = digest(
            {str(i): piece.view(piece.parameter) for i, piece in enumerate(slices)}
        )
    history: list[Step] = []

    def record(step: Step, due: bool) -> bool:
        """Adds a step to the history; says whether the forget level is reached."""
        measured = {k: float(v) for k, v in evaluate(model).items()} if evaluate is not None and due else {}
        history.append(replace(step, measured=measured))
        if step.step:
            on_step(history[-1])
        if stop_at is not None and measured and FORGET not in measured:
            raise ValueError(f"evaluate returned {', '.join(measured)}; stop_at needs the number {FORGET!r}")
        return stop_at is not None and bool(measured) and measured[FORGET] <= stop_at

    def due(number: int) -> bool:
        return number % evaluate_every == 0 or number == steps

    def stopping() -> bool:
        return interrupt is not None and interrupt.requested

    # a run that is kept ends between two steps, so that it goes on from the last
    with (
        nullcontext() if keep is None else FinishOnInterrupt() as interrupt,
        trainable(model, slices) as weights,
    ):
        optimizer = torch.optim.AdamW(weights.parameters, lr=rate, weight_decay=0.0)
        losses = objective_of(look, forget[0], method, beta, steer, retain_weight, seed)
        compares = losses.forget_compares or losses.retain_compares
        original = snapshot(slices) if compares else []
        if keep is not None:
            history = resume_training(keep, run, weights, optimizer, steps=steps, stop_at=stop_at)
        # what was kept is measured again if it is due: that depends on `steps`, which may be others now
        last = history.pop() if history else Step(0)
        number, reached = last.step, False
        if last.step or evaluate is not None:
            reached = record(last, due(last.step))
        while number < steps and not reached and not stopping():
            number += 1
            batch = forget[(number - 1) % len(forget)]
            kept = retain[(number - 1) % len(retain)] if losses.retain is not None else None
            terms = backward(look, slices, losses, original, (batch, kept), anchor)
            step = Step(number, *terms)
            if not all(map(math.isfinite, terms)):
                raise ValueError(
                    f"step {number}: the losses are {_told(step)}; use a smaller lr than {rate:g}"
                )
            weights.collect()
            nn.utils.clip_grad_norm_(weights.parameters, grad_clip)
            optimizer.step()
            weights.write()
            reached = record(step, due(number))
            ends = reached or number == steps or stopping()
            if keep is not None and (ends or number % keep.every == 0):
                keep_training(keep, run, weights, optimizer, history)
        if stopping():
            raise KeyboardInterrupt
    total = sum(p.numel() for p in model.parameters())
    return Unlearning(list(targets), weights.count, weights.count / total, history, reached)


def default_lr(scope: str) -> float:
    """The learning rate of a scope where none is given."""
    return 1e-4 if scope == "expert" else 5e-5


def _check(
    forget: Sequence[Batch],
    retain: Sequence[Batch],
    method: str,
    retain_weight: float | None,
    scope: str,
    steps: int,
    lr: float | None,
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
    check_lr(lr)
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


def check_lr(lr: float | None) -> None:
    """Raises ValueError if it is no learning rate."""
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr={lr}; a learning rate is more than 0, such as {default_lr('expert'):g}")


def _told(step: Step) -> str:
    return f"forget {step.forget:g}, retain {step.retain:g}, anchor {step.anchor:g}"
