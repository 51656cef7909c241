"""What unlearning makes small: losses on text to forget and on text to keep.

A loss takes what the model gives now, what it gave before it was changed where the loss compares the two, and
the batch. Letters: B sequences, S tokens, V vocabulary, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.tune.batch import Batch


@dataclass(frozen=True, eq=False)
class Given:
    """What a model gives for a batch.

    Args:
        logits_BSV: for each next token.
        hidden_BSD: the residual stream after the layer of the deepest expert that is unlearned.
    """

    logits_BSV: Tensor
    hidden_BSD: Tensor


# (now, before, batch) → scalar; `before` is None where the objective did not ask for it
Loss = Callable[[Given, Given | None, Batch], Tensor]


@dataclass(frozen=True)
class Objective:
    """forget + retain_weight · retain.

    Args:
        forget: loss on text to forget.
        retain: loss on text to keep; None where the method has none.
        retain_weight: λ.
        forget_compares: whether `forget` needs what the model gave before.
        retain_compares: the same for `retain`.
    """

    forget: Loss
    retain: Loss | None = None
    retain_weight: float = 1.0
    forget_compares: bool = False
    retain_compares: bool = False


METHODS = ("ga", "gdiff", "npo", "rmu", "kl")


def objective(
    method: str, *, beta: float = 0.1, control_D: Tensor | None = None, retain_weight: float | None = None
) -> Objective:
    """The losses of a published method.

    Args:
        method: "ga", gradient ascent: the cross-entropy of the text to forget should grow. "gdiff": and that
            of the text to keep should not. "kl": ascent, and the predictions on text to keep should stay.
            "npo": negative preference optimisation, ascent that levels off, with the second term of gdiff.
            "rmu": representations of the text to forget are led to `control_D`, others should stay.
        beta: of npo: the larger, the sooner it levels off.
        control_D: of rmu: where it leads to.
        retain_weight: λ; None for 1, or 1200 for rmu; 0 for no loss on text to keep.

    Raises ValueError for an unknown method, or rmu without `control_D`.

    Source: as in UOE (2024, arXiv 2411.18797), table 1; kl: Maini et al. 2024 (TOFU), KL minimisation; npo:
    Zhang et al. 2024; rmu: Li et al. 2024 (WMDP).
    """
    weight = 1.0 if retain_weight is None else retain_weight
    if retain_weight == 0 and method in METHODS:
        whole = objective(method, beta=beta, control_D=control_D)
        return replace(whole, retain=None, retain_compares=False)
    if method == "ga":
        return Objective(_ascent)
    if method == "gdiff":
        return Objective(_ascent, _cross_entropy, weight)
    if method == "kl":
        return Objective(_ascent, divergence, weight, retain_compares=True)
    if method == "npo":
        return Objective(partial(npo, beta=beta), _cross_entropy, weight, forget_compares=True)
    if method == "rmu":
        if control_D is None:
            raise ValueError("rmu needs control_D, where it leads representations to")
        weight = 1200.0 if retain_weight is None else retain_weight
        return Objective(partial(misdirection, control_D=control_D), drift, weight, retain_compares=True)
    raise ValueError(f"no method {method!r}; use one of {', '.join(METHODS)}")


def _cross_entropy(now: Given, before: Given | None, batch: Batch) -> Tensor:
    logits_BSV = now.logits_BSV[:, :-1].float()
    return F.cross_entropy(logits_BSV.flatten(0, 1), batch.targets().flatten())


def _ascent(now: Given, before: Given | None, batch: Batch) -> Tensor:
    return -_cross_entropy(now, before, batch)


def npo(now: Given, before: Given | None, batch: Batch, *, beta: float) -> Tensor:
    """-(2/β) · mean over sequences of log σ(-β · log(p now / p before)), p being of the whole sequence."""
    assert before is not None
    ratio_B = _log_likelihood(now, batch) - _log_likelihood(before, batch)
    return -2 / beta * F.logsigmoid(-beta * ratio_B).mean()


def divergence(now: Given, before: Given | None, batch: Batch) -> Tensor:
    """KL(before ‖ now) of the predictions that count, nats per token."""
    assert before is not None
    counts_BS = batch.targets() != -100
    now_NV, before_NV = (
        given.logits_BSV[:, :-1][counts_BS].float().log_softmax(-1) for given in (now, before)
    )
    return F.kl_div(now_NV, before_NV, reduction="batchmean", log_target=True)


def misdirection(now: Given, before: Given | None, batch: Batch, *, control_D: Tensor) -> Tensor:
    """Mean over tokens of ‖h - control‖², h being the residual stream."""
    return _square_distance(now.hidden_BSD.float() - control_D, batch)


def drift(now: Given, before: Given | None, batch: Batch) -> Tensor:
    """Mean over tokens of ‖h now - h before‖²."""
    assert before is not None
    return _square_distance(now.hidden_BSD.float() - before.hidden_BSD.float(), batch)


def control_vector(hidden_BSD: Tensor, batch: Batch, *, scale: float, seed: int) -> Tensor:
    """[D]: a random direction, entries uniform in [0, 1), as long as `scale` times the mean ‖h‖."""
    generator = torch.Generator().manual_seed(seed)
    direction_D = torch.rand(hidden_BSD.shape[-1], generator=generator).to(hidden_BSD.device)
    length_BS = hidden_BSD.float().norm(dim=-1)
    present_BS = batch.present_BS if batch.present_BS is not None else torch.ones_like(length_BS).bool()
    control_D: Tensor = scale * length_BS[present_BS].mean() * direction_D / direction_D.norm()
    return control_D


def _log_likelihood(given: Given, batch: Batch) -> Tensor:
    targets_BS = batch.targets()
    logits_BVS = given.logits_BSV[:, :-1].float().transpose(1, 2)
    return -F.cross_entropy(logits_BVS, targets_BS, reduction="none").sum(1)


def _square_distance(away_BSD: Tensor, batch: Batch) -> Tensor:
    distance_BS: Tensor = away_BSD.square().sum(-1)
    return distance_BS.mean() if batch.present_BS is None else distance_BS[batch.present_BS].mean()
