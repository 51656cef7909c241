"""The gradients of one step: forward passes of one model, and what they give the losses."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.hf import MoEBlock, route
from coterie.nn import Routing
from coterie.nn.balance import router_anchor
from coterie.tune.attribute import Target
from coterie.tune.batch import Batch
from coterie.tune.losses import Given, Objective, control_vector, objective
from coterie.tune.trainable import Slice, replaced


class Look:
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


def backward(
    look: Look,
    slices: Sequence[Slice],
    losses: Objective,
    original: Sequence[Tensor],
    pair: tuple[Batch, Batch | None],
    anchor: tuple[float, Literal["topk", "softmax"]] | None,
) -> tuple[float, float, float]:
    """Gives the model the gradients of one step.

    Args:
        look: at the model.
        slices: that are trained.
        losses: of the method.
        original: the slices as they were, where a loss compares; else empty.
        pair: batches to forget and to keep, None where there is no loss on the latter.
        anchor: weight of the router anchor, and what it acts on; None for no anchor.

    Returns its losses: forget, retain, anchor.
    """
    forget, retain = (None if batch is None else batch.to(look.model.device) for batch in pair)
    assert forget is not None
    # the model as it was is the same model with the slices as they were: no second one is in memory
    with replaced(slices, original) if original else nullcontext(), torch.no_grad():
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


def objective_of(
    look: Look,
    batch: Batch,
    method: str,
    beta: float,
    steer: float,
    retain_weight: float | None,
    seed: int,
) -> Objective:
    """The losses of a method, with rmu's direction, `steer` times as long as the stream of this batch is."""
    control_D = None
    if method == "rmu":
        with torch.no_grad():
            batch = batch.to(look.model.device)
            control_D = control_vector(look(batch)[0].hidden_BSD, batch, scale=steer, seed=seed)
    return objective(method, beta=beta, control_D=control_D, retain_weight=retain_weight)
