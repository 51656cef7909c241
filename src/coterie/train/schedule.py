"""The learning rate of a step."""

import math


def cosine_with_warmup(step: int, steps: int, *, warmup: int = 0, min_ratio: float = 0.1) -> float:
    """The share of the peak learning rate at a step: a linear rise, then half a cosine down.

    A pure function of its arguments, so that resuming needs no state.

    Args:
        step: from 0.
        steps: steps of the whole run; later ones stay at `min_ratio`.
        warmup: steps of the rise; the last of them, or step 0 without warm-up, is at 1.
        min_ratio: the share reached at the last step.

    Source: Loshchilov and Hutter 2016 (SGDR), without restarts.

    >>> [round(cosine_with_warmup(step, 7, warmup=2), 3) for step in range(7)]
    [0.5, 1.0, 0.914, 0.689, 0.411, 0.186, 0.1]
    """
    if step < warmup:
        return (step + 1) / warmup
    peak = max(warmup - 1, 0)
    progress = min((step - peak) / max(steps - 1 - peak, 1), 1.0)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
