"""How much each expert matters to some text: one function of a block's record per method, [E] float64.

A new method is a function like those here, given in the place of a name; a line in IMPORTANCE names it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coterie.hf import BlockRecord

Importance = Callable[[BlockRecord], Tensor]


def frequency(record: BlockRecord) -> Tensor:
    """How many slots it filled."""
    return record.sum_by_expert(torch.ones_like(record.weights))


def gating(record: BlockRecord) -> Tensor:
    """Σ weight, as applied."""
    return record.sum_by_expert(record.weights)


def gating_norm(record: BlockRecord) -> Tensor:
    """Σ weight · ‖output‖: a bound of what it added to the residual stream."""
    return record.sum_by_expert(record.weights * record.norms)


def gating_token(record: BlockRecord) -> Tensor:
    """Σ weight · (how far the block turned the token)."""
    return record.sum_by_expert(record.weights * _moved_T1(record))


def reap(record: BlockRecord) -> Tensor:
    """Mean of weight · ‖output‖ over the tokens that it was given: rarely used experts may matter, too.

    Source: Lasby et al. 2025 (REAP), equation 9.
    """
    return gating_norm(record) / frequency(record).clamp(min=1)


def easy_ep(record: BlockRecord) -> Tensor:
    """Σ weight · ‖output‖ · (how far the block turned the token).

    Source: Dong et al. 2025 (EASY-EP, arXiv 2504.06792), section 4.
    """
    return record.sum_by_expert(record.weights * record.norms * _moved_T1(record))


IMPORTANCE: dict[str, Importance] = {
    "frequency": frequency,
    "gating": gating,
    "gating-norm": gating_norm,
    "gating-token": gating_token,
    "reap": reap,
    "easy-ep": easy_ep,
}


def _moved_T1(record: BlockRecord) -> Tensor:
    if len(record.moved) != len(record.experts):
        raise ValueError(
            f"{record.name}: how far it turns the residual stream cannot be recorded in this family; "
            "use a score without it, such as gating-norm or reap"
        )
    return record.moved.unsqueeze(1)


def importance(records: Sequence[BlockRecord], method: str | Importance, *, seed: int = 0) -> list[Tensor]:
    """[E] float64 per block.

    Args:
        records: of `coterie.hf.recording`, one per block.
        method: a key of IMPORTANCE, "random", or a function of a record like those here.
        seed: of "random".

    Raises:
        ValueError: an unknown method; records without a token; a function that gives something else.

    >>> record = BlockRecord("mlp", 3, torch.tensor([[0, 2], [2, 1]]), torch.tensor([[0.9, 0.1], [0.8, 0.2]]))
    >>> importance([record], lambda r: r.sum_by_expert(r.weights.square()))[0].round(decimals=2).tolist()
    [0.81, 0.04, 0.65]
    """
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(r.num_experts, generator=generator, dtype=torch.float64) for r in records]
    if not callable(method) and method not in IMPORTANCE:
        raise ValueError(f"no method {method!r}; use one of {', '.join([*IMPORTANCE, 'random'])}")
    empty = [record.name for record in records if not len(record.experts)]
    if empty:
        raise ValueError(f"nothing was recorded for {empty[0]}; give text to calibrate on")
    score = method if callable(method) else IMPORTANCE[method]
    scores = [score(record) for record in records]
    for record, score_E in zip(records, scores, strict=True):
        if score_E.shape != (record.num_experts,) or not score_E.isfinite().all():
            raise ValueError(
                f"{record.name}: a score should be {record.num_experts} finite numbers, one per expert; "
                f"found {score_E.tolist()}"
            )
    return scores


def mixed(domains: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The scores of several texts as one: each text's are made to sum to 1 within a block, then averaged.

    >>> mixed([[torch.tensor([3.0, 1.0])], [torch.tensor([0.0, 8.0])]])[0].tolist()
    [0.375, 0.625]
    """
    shares = [
        [score_E.double() / score_E.double().sum().clamp(min=1e-300) for score_E in scores]
        for scores in domains
    ]
    return [torch.stack(each).mean(0) for each in zip(*shares, strict=True)]


def kept_experts(score_E: Tensor, keep: int, *, groups: int = 1) -> list[int]:
    """Ids of the `keep` most important experts, rising; as many in each routing group.

    Args:
        score_E: importance.
        keep: how many, a multiple of `groups`.
        groups: routing groups that the experts are divided into in order.

    Raises:
        ValueError: keep out of range, or not divisible by the groups.

    >>> kept_experts(torch.tensor([0.1, 0.9, 0.5, 0.4]), 2)
    [1, 2]
    >>> kept_experts(torch.tensor([5, 4, 1, 2]), 2, groups=2)
    [0, 3]
    """
    if not 1 <= keep <= len(score_E):
        raise ValueError(f"keep={keep} of {len(score_E)} experts; use 1 ≤ keep ≤ {len(score_E)}")
    if keep % groups:
        raise ValueError(f"keep={keep} cannot be shared out among {groups} routing groups; use a multiple")
    size = len(score_E) // groups
    best = score_E.view(groups, size).topk(keep // groups).indices + size * torch.arange(groups).unsqueeze(1)
    return sorted(best.flatten().tolist())


def overlap(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Share of kept experts that two choices have in common, over all blocks.

    >>> overlap([[0, 1], [2, 3]], [[0, 1], [3, 4]])
    0.75
    """
    common = sum(len(set(a) & set(b)) for a, b in zip(some, others, strict=True))
    return common / sum(map(len, some))
