"""One choice per item, at the least total cost, within a budget: solved exactly.

Letters: N items (experts), J choices for each (bit widths).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def cheapest_choices(
    costs_NJ: ArrayLike, sizes: Sequence[int], budget: int, *, at_least_one: Sequence[int] = ()
) -> list[int]:
    """The multiple-choice knapsack: min Σ cost, one choice per item, Σ size ≤ budget.

    A dynamic program over (items left, budget left, which of the wanted choices are still missing), so the
    answer is the optimum, not near it. Of equally good answers the one with smaller choices at the first
    items is taken. The wanted choices are in the best answer anyway, more often than not; only otherwise are
    the missing ones counted. Time is N · J · b and memory N · b bytes, b being the budget beyond what the
    smallest choices take, and 2^(choices wanted) times that where they are counted: 6144 experts with 2 bits
    on average take a second and 38 MB.

    Args:
        costs_NJ: [N, J] of each choice for each item; finite.
        sizes: of each choice, whole numbers ≥ 0.
        budget: Σ size at most.
        at_least_one: choices, by index, that at least one item each must take.

    Returns the index of each item's choice, N of them.

    Raises ValueError if a cost is not finite, shapes do not fit, or nothing fits the budget.

    Source: the textbook recursion (Dudziński and Walukiewicz 1987); the program it solves here is that of
    MC (Huang et al. 2024, equation 4), which the authors give to a commercial solver.

    >>> cheapest_choices([[9, 4, 1], [5, 3, 2], [9, 2, 0]], sizes=[1, 2, 3], budget=6)
    [2, 0, 1]
    """
    costs = np.asarray(costs_NJ, dtype=np.float64)
    if costs.ndim != 2 or costs.shape[1] != len(sizes):
        raise ValueError(f"costs have shape {costs.shape}; {len(sizes)} sizes take [items, {len(sizes)}]")
    if not np.isfinite(costs).all():
        raise ValueError(f"{int((~np.isfinite(costs)).sum())} of {costs.size} costs are not finite")
    least, items = min(sizes), len(costs)
    extra = [size - least for size in sizes]
    spare = min(budget - items * least, items * max(extra))
    chosen = _cheapest(costs, extra, spare, ())
    if chosen is not None and not set(at_least_one) <= set(chosen):
        chosen = _cheapest(costs, extra, spare, at_least_one)
    if chosen is None:
        raise ValueError(
            f"nothing fits: {items} items with sizes {list(sizes)} and a budget of {budget}"
            + (f", choices {list(at_least_one)} at least once each" if at_least_one else "")
        )
    return chosen


def _cheapest(
    costs_NJ: Any, sizes: Sequence[int], budget: int, at_least_one: Sequence[int]
) -> list[int] | None:
    """See `cheapest_choices`; the smallest size is 0. None where nothing fits."""
    if budget < 0:
        return None
    items, wanted = len(costs_NJ), {choice: 1 << place for place, choice in enumerate(at_least_one)}
    states = np.arange(1 << len(wanted))  # bit set: that choice has been taken
    # best[s, b]: least cost of items n, n + 1, … with b left to spend when s has been taken before them
    best = np.full((len(states), budget + 1), np.inf)
    best[-1] = 0.0
    taken_NSB = np.zeros((items, *best.shape), np.min_scalar_type(len(sizes)))
    for n in reversed(range(items)):
        after, best = best, np.full_like(best, np.inf)
        for choice, size in enumerate(sizes):
            if size > budget:
                continue
            cost = costs_NJ[n, choice] + after[states | wanted.get(choice, 0), : budget + 1 - size]
            better = cost < best[:, size:]
            np.copyto(best[:, size:], cost, where=better)
            np.copyto(taken_NSB[n, :, size:], choice, where=better)
    if not np.isfinite(best[0, budget]):
        return None
    chosen: list[int] = []
    state, left = 0, budget
    for taken in taken_NSB:
        chosen.append(int(taken[state, left]))
        state, left = state | wanted.get(chosen[-1], 0), left - sizes[chosen[-1]]
    return chosen
