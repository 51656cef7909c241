"""One choice per item, at the least total cost, within a budget: solved exactly.

Letters: N items (experts), J choices for each (bit widths).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def cheapest_choices(
    costs_NJ: ArrayLike, sizes: Sequence[int], budget: int, *, at_least_one: Sequence[int] = ()
) -> list[int]:
    """The multiple-choice knapsack: min Σ cost, one choice per item, Σ size ≤ budget.

    A dynamic program over (items left, budget left, which of the wanted choices are still missing), so the
    answer is the optimum, not near it. Of equally good answers the one with smaller choices at the first
    items is taken. Time and memory are N · budget · 2^(choices wanted) · J.

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
    items, budget = len(costs), min(budget, len(costs) * max(sizes))
    wanted = {choice: 1 << place for place, choice in enumerate(at_least_one)}
    states = 1 << len(wanted)  # bit set: that choice has been taken
    # best[n, s, b]: least cost of items n, n + 1, … with b left to spend when s has been taken before them
    best = np.full((items + 1, states, max(budget, 0) + 1), np.inf)
    best[items, states - 1] = 0.0
    for n in reversed(range(items)):
        for state in range(states):
            for choice, size in enumerate(sizes):
                if size > budget:
                    continue
                rest = best[n + 1, state | wanted.get(choice, 0), : budget + 1 - size]
                np.minimum(best[n, state, size:], costs[n, choice] + rest, out=best[n, state, size:])
    if budget < 0 or not np.isfinite(best[0, 0, budget]):
        raise ValueError(
            f"nothing fits: {items} items with sizes {list(sizes)} and a budget of {budget}"
            + (f", choices {list(at_least_one)} at least once each" if at_least_one else "")
        )
    chosen: list[int] = []
    state, left = 0, budget
    for n in range(items):
        for choice, size in enumerate(sizes):
            after = state | wanted.get(choice, 0)
            # the very sum that was the minimum above, so equality is exact
            if size <= left and costs[n, choice] + best[n + 1, after, left - size] == best[n, state, left]:
                chosen.append(choice)
                state, left = after, left - size
                break
    return chosen
