"""Loss functions, and what they report. A loss function takes (model, batch) and returns a `LossOutput`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.nn import Routing
from coterie.nn.balance import entropy as mean_entropy
from coterie.nn.balance import load_balance, router_z


@dataclass
class LossOutput:
    """What a loss function returns for one micro-batch.

    Args:
        loss: scalar to differentiate; a mean over the micro-batch.
        cross_entropy: scalar without gradient, nats per token; for other tasks, their plain loss.
        tokens: what the means run over; weighs micro-batches of different sizes in an evaluation.
        routings: one per MoE layer; empty for a dense model.
        metrics: more scalars to report, averaged over tokens.
    """

    loss: Tensor
    cross_entropy: Tensor
    tokens: int
    routings: list[Routing] = field(default_factory=list)
    metrics: dict[str, Tensor] = field(default_factory=dict)


LossFn = Callable[[nn.Module, Any], LossOutput]


def language_model_loss(
    *,
    balance: float = 0.01,
    z: float = 0.0,
    entropy: float = 0.0,
    routing_loss: Callable[[list[Routing]], Tensor] | None = None,
) -> LossFn:
    """Next-token cross-entropy, plus the losses on the routing of the MoE layers.

    Args:
        balance: weight of `coterie.nn.balance.load_balance`.
        z: weight of `coterie.nn.balance.router_z`.
        entropy: weight of `coterie.nn.balance.entropy`; above 0 for a router that should decide.
        routing_loss: a method's own loss of the routings, added to these.

    Returns: a loss function for a model that maps ids [B, S] to (logits [B, S, V], list of routings), and
    batches of ids [B, S + 1]. Its metrics are, for a model with experts, "balance", "router_z" and
    "routing_loss" (when asked for), and "entropy" (nats).

    >>> from coterie.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(257, dim=16, layers=1, heads=1, kv_heads=1, head_dim=16, hidden=32))
    >>> output = language_model_loss()(model, torch.randint(257, (2, 9)))
    >>> output.tokens, sorted(output.metrics), round(output.cross_entropy.item())
    (16, [], 6)
    """

    def loss_fn(model: nn.Module, ids: Tensor) -> LossOutput:
        logits_BSV, routings = model(ids[:, :-1])
        targets = ids[:, 1:].flatten()
        # at least float32: a bf16 log-softmax is good to two digits only
        precise = torch.promote_types(logits_BSV.dtype, torch.float32)
        cross_entropy = F.cross_entropy(logits_BSV.flatten(0, 1).to(precise), targets)
        loss, metrics = cross_entropy, {}
        if routings:
            metrics["balance"] = load_balance(routings)
            # a score of exactly 0 has an infinite slope of entropy: no gradient unless it is asked for
            metrics["entropy"] = mean_entropy(routings if entropy else [r.detach() for r in routings])
            loss = loss + balance * metrics["balance"] + entropy * metrics["entropy"]
            if z:
                metrics["router_z"] = router_z(routings)
                loss = loss + z * metrics["router_z"]
            if routing_loss is not None:
                metrics["routing_loss"] = routing_loss(list(routings))
                loss = loss + metrics["routing_loss"]
        return LossOutput(loss, cross_entropy.detach(), targets.numel(), list(routings), metrics)

    return loss_fn


def classification_loss(
    penalty: Callable[[list[Routing]], Tensor] | None = None, *, label_smoothing: float = 0.0
) -> LossFn:
    """Cross-entropy of the right class, plus a penalty on the routings of a model with experts.

    Args:
        penalty: a loss on the model's routings, with its weight: `lambda r: 0.01 * load_balance(r)`. A model
            without experts has none.
        label_smoothing: share of the target spread over all classes, in the loss only.

    Returns: a loss function for a model that maps inputs to (logits [B, V], list of routings), and batches
    (inputs, labels [B]). Its metric is "accuracy", its `tokens` are items.

    >>> from coterie.models import ViT, ViTConfig
    >>> model = ViT(ViTConfig((8, 8), patch=4, classes=5, dim=8, layers=1, heads=2, hidden=8))
    >>> output = classification_loss()(model, (torch.rand(6, 3, 8, 8), torch.arange(6) % 5))
    >>> output.tokens, output.cross_entropy.item() > 0, list(output.metrics)
    (6, True, ['accuracy'])
    """

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
        inputs, labels_B = batch
        logits_BV, routings = model(inputs)
        logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        cross_entropy = F.cross_entropy(logits_BV, labels_B)
        loss = cross_entropy
        if label_smoothing:
            loss = F.cross_entropy(logits_BV, labels_B, label_smoothing=label_smoothing)
        if penalty is not None and routings:
            loss = loss + penalty(list(routings))
        accuracy = (logits_BV.argmax(-1) == labels_B).double().mean()
        return LossOutput(loss, cross_entropy.detach(), len(labels_B), list(routings), {"accuracy": accuracy})

    return loss_fn
