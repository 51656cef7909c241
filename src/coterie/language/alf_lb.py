"""Loss-free load balancing, read as a one-step primal-dual method, with the quantities its theory speaks of.

Choosing experts by score + bias maximises a Lagrangian over assignments; moving the bias by the load's error
is a step down its dual. So one can ask how far from optimal a bias is, whether a step improved, and what a
schedule will cost. The selection itself is `coterie.nn.TopK(k, bias=...)`; the sign rule at a constant rate
is `coterie.nn.balance.loss_free_update`.

Letters: T tokens, E experts, K experts per token, L = K T / E the load that balances.

Source: Han and Zhong 2025 (arXiv 2512.03915), on the procedure of Wang et al. 2024 (arXiv 2408.15664).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.nn import TopK
from coterie.nn.select import check_top_k
from coterie.train import Run

# (loads [E], number of the step from 1) → what to add to the bias [E]
Rule = Callable[[Tensor, int], Tensor]

SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1.0,
    "sqrt": lambda step: step**-0.5,
    "inverse": lambda step: 1 / step,
}


def sign_rule(u: float, schedule: str = "constant") -> Rule:
    """u up for an underloaded expert, u down for an overloaded one; nothing at exactly L.

    Args:
        u: step size ≥ 0, in units of the scores.
        schedule: "constant": u at every step; "sqrt": u / √n at step n; "inverse": u / n.

    Raises ValueError for u < 0 or an unknown schedule.

    >>> sign_rule(0.5, "sqrt")(torch.tensor([30, 10, 20]), 4).tolist()
    [-0.25, 0.25, 0.0]
    """
    scale = _schedule(u, schedule)
    return lambda loads_E, step: scale(step) * torch.sign(loads_E.double().mean() - loads_E)


def proportional_rule(u: float, k: int, schedule: str = "constant") -> Rule:
    """u (K/E - share of tokens at the expert): a subgradient step on the dual per token.

    Args:
        u: as in `sign_rule`, but free of the batch's size.
        k: experts per token.
        schedule: as in `sign_rule`.

    >>> proportional_rule(1.0, k=1)(torch.tensor([30, 10, 20]), 1).tolist()[1:]
    [0.16666666666666666, 0.0]
    """
    scale = _schedule(u, schedule)
    return lambda loads_E, step: scale(step) * k * (1 / len(loads_E) - loads_E.double() / loads_E.sum())


class BiasUpdate:
    """Callback of `fit`: after each step, moves every layer's selection bias by a rule.

    For models whose every MoE layer selects with `TopK(..., bias=...)`, in the order of their routings. The
    step is the run's, so that a resumed run goes on with its schedule; the loads are those of all processes.

    Args:
        rule: `sign_rule`, `proportional_rule`, or any (loads, step) → increments.
        recenter: take the mean off each bias, which changes no choice.
        max_abs: largest |bias|; None for no limit. For routers whose bias runs away (top-1, many experts).

    Raises (on the first step):
        ValueError: selections with a bias and routed layers differ in number, or in experts.
    """

    def __init__(self, rule: Rule, *, recenter: bool = False, max_abs: float | None = None) -> None:
        self.rule, self.recenter, self.max_abs = rule, recenter, max_abs

    @torch.no_grad()
    def on_step(self, run: Run) -> None:
        biases = [m.bias for m in run.model.modules() if isinstance(m, TopK) and m.bias is not None]
        if [len(bias_E) for bias_E in biases] != [len(load_E) for load_E in run.loads]:
            raise ValueError(
                f"BiasUpdate found selection biases over {[len(b) for b in biases]} experts but routed "
                f"layers over {[len(load_E) for load_E in run.loads]}; give every layer TopK(bias=zeros(E))"
            )
        for bias_E, load_E in zip(biases, run.loads, strict=True):
            bias_E += self.rule(load_E, run.step).to(bias_E)
            if self.recenter:
                bias_E -= bias_E.mean()
            if self.max_abs is not None:
                bias_E.clamp_(-self.max_abs, self.max_abs)


def max_violation(loads_E: Tensor) -> float:
    """MaxVio: the busiest expert's load over the balanced one, minus 1.

    >>> max_violation(torch.tensor([30, 10, 20]))
    0.5
    """
    loads_E = loads_E.double()
    return float(loads_E.max() / loads_E.mean() - 1)


def dual_value(scores_TE: Tensor, bias_E: Tensor, k: int) -> float:
    """D(p) = Σ_tokens (sum of the K largest score + p) - L Σ p, which bounds every balanced assignment.

    Convex in p, indifferent to adding a constant to p; its subgradient is load - L.

    >>> scores = torch.tensor([[3.0, 0.0], [2.0, 0.0]])
    >>> dual_value(scores, torch.zeros(2), k=1), dual_value(scores, torch.tensor([-1.0, 1.0]), k=1)
    (5.0, 3.0)
    """
    biased_TE = scores_TE.double() + bias_E.double()
    balanced = k * len(scores_TE) / scores_TE.shape[1]
    return float(biased_TE.topk(k, dim=-1).values.sum() - balanced * bias_E.double().sum())


def solve_assignment(scores_TE: Tensor, k: int, *, sweeps: int = 2000, tolerance: float = 1e-12) -> Tensor:
    """p* [E]: a bias that minimises the dual of these scores, found by alternating quantiles.

    Each sweep sets every token's price between its K-th and (K+1)-th best biased score, then every expert's
    bias so that L tokens are willing to pay. The best bias over the sweeps is returned, with mean 0.

    Args:
        scores_TE: fixed scores.
        k: experts per token, K < E.
        sweeps: at most this many.
        tolerance: stop when no bias moves by more.

    Raises:
        ValueError: K is not in 1 … E - 1, or a score is NaN or infinite.

    >>> solve_assignment(torch.tensor([[3.0, 0.0], [2.0, 0.0]]), k=1).tolist()
    [-1.25, 1.25]
    """
    scores_TE = check_scores(scores_TE, k).double()
    tokens, experts = scores_TE.shape
    if k == experts:
        raise ValueError(f"top_k={k} of {experts} experts uses all of them; there is nothing to assign")
    last_in, first_out = math.ceil(tokens * k / experts), tokens * k // experts + 1
    bias_E = best_E = scores_TE.new_zeros(experts)
    best = dual_value(scores_TE, bias_E, k)
    for _ in range(sweeps):
        # midpoints: at either end of the interval the alternation can stall above the optimum
        price_T1 = (scores_TE + bias_E).topk(k + 1, dim=-1).values[:, k - 1 :].mean(-1, keepdim=True)
        surplus = (scores_TE - price_T1).topk(first_out, dim=0).values
        new_E = -(surplus[last_in - 1] + surplus[first_out - 1]) / 2
        new_E -= new_E.mean()
        value = dual_value(scores_TE, new_E, k)
        if value < best:
            best, best_E = value, new_E
        moved, bias_E = float((new_E - bias_E).abs().max()), new_E
        if moved <= tolerance:
            break
    return best_E


@dataclass(frozen=True)
class Step:
    """One iteration on fixed scores: what the theory says about it, measured.

    Args:
        loads_E: before the step.
        bias_E: after it.
        dual: D before the step.
        change: D after it minus D before.
        gain: Σ increment · (L - load) over experts: what D would fall by if every token kept its experts.
        benefit: what the tokens win by choosing anew under the moved bias; change = benefit - gain.
        preference_violations: tokens that left an expert for one with at least as much load.
        near: most tokens of one expert whose choice a shift by the step's reach could change.
    """

    loads_E: Tensor
    bias_E: Tensor
    dual: float
    change: float
    gain: float
    benefit: float
    preference_violations: int
    near: int


@torch.no_grad()
def replay(scores_TE: Tensor, k: int, rule: Rule, steps: int) -> Iterator[Step]:
    """Balances fixed scores, step by step.

    Args:
        scores_TE: a router's scores for T tokens; of a user's own router, or drawn.
        k: experts per token.
        rule: moves the bias, which starts at zero.
        steps: how many.

    Raises:
        ValueError: K is not in 1 … E, or a score is NaN or infinite.

    >>> scores = torch.rand(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, 0, 0, 0])
    >>> violation = [max_violation(step.loads_E) for step in replay(scores, 1, sign_rule(0.01), steps=200)]
    >>> violation[0] > 1, violation[-1] < 0.1
    (True, True)
    """
    scores_TE = check_scores(scores_TE, k).double()
    select = TopK(k, gate="identity", bias=torch.zeros(scores_TE.shape[1])).double()
    bias_E, balanced = select.bias, k * len(scores_TE) / scores_TE.shape[1]
    assert bias_E is not None
    biased_TE, routing = scores_TE.clone(), select(scores_TE)
    chosen_TE = routing.used_TE
    dual = float((biased_TE * chosen_TE).sum())
    for n in range(1, steps + 1):
        loads_E, step_E = routing.load, rule(routing.load, n).to(bias_E)
        near = _near_choices(biased_TE, k, float(step_E.max() - step_E.min()))
        bias_E += step_E
        biased_TE, routing = scores_TE + bias_E, select(scores_TE)
        kept, chosen_before_TE, chosen_TE = float((biased_TE * chosen_TE).sum()), chosen_TE, routing.used_TE
        chosen = float((biased_TE * chosen_TE).sum())
        dual_after = chosen - balanced * float(bias_E.sum())
        yield Step(
            loads_E=loads_E,
            bias_E=bias_E.clone(),
            dual=dual,
            change=dual_after - dual,
            gain=float((step_E * (balanced - loads_E.double())).sum()),
            benefit=chosen - kept,
            preference_violations=preference_violations(chosen_before_TE, chosen_TE, loads_E),
            near=near,
        )
        dual = dual_after


def preference_violations(before_TE: Tensor, after_TE: Tensor, loads_E: Tensor) -> int:
    """Tokens that took up an expert with at least as much load as one that they left.

    Args:
        before_TE, after_TE: bool, which experts each token uses.
        loads_E: before the change.

    >>> before, after = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    >>> [preference_violations(before, after, torch.tensor(loads)) for loads in ([3, 1], [1, 3], [2, 2])]
    [0, 1, 1]
    """
    loads_E = loads_E.double()
    taken_T = loads_E.expand(before_TE.shape).masked_fill(~(after_TE & ~before_TE), -torch.inf).amax(-1)
    left_T = loads_E.expand(before_TE.shape).masked_fill(~(before_TE & ~after_TE), torch.inf).amin(-1)
    return int((taken_T >= left_T).sum())


def regret(scores_TE: Tensor, bias_E: Tensor, best_E: Tensor, k: int) -> float:
    """How much worse a bias is on a batch than the best fixed one: (D(p) - D(p*)) / T."""
    return (dual_value(scores_TE, bias_E, k) - dual_value(scores_TE, best_E, k)) / len(scores_TE)


def check_scores(scores_TE: Tensor, k: int) -> Tensor:
    """The scores, if they are [T, E] and finite, and K fits. ValueError otherwise."""
    if scores_TE.dim() != 2:
        raise ValueError(f"scores have shape {tuple(scores_TE.shape)}; should be [tokens, experts]")
    check_top_k(k, scores_TE.shape[1])
    broken = int((~scores_TE.isfinite()).any(-1).sum())
    if broken:
        raise ValueError(f"scores of {broken} tokens hold NaN or infinity; look for the router's fault first")
    return scores_TE


def _near_choices(biased_TE: Tensor, k: int, reach: float) -> int:
    """Over experts, the most tokens whose choice of that expert a relative shift of `reach` could change."""
    best = biased_TE.topk(min(k + 1, biased_TE.shape[1]), dim=-1).values
    inside, outside = best[:, k - 1 : k], best[:, -1:]
    margin_TE = torch.where(biased_TE >= inside, biased_TE - outside, inside - biased_TE)
    return int((margin_TE <= reach).sum(0).max())


def _schedule(u: float, schedule: str) -> Callable[[int], float]:
    if u < 0:
        raise ValueError(f"u={u}; should be at least 0 (a negative step feeds the busiest expert)")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}; use one of {', '.join(SCHEDULES)}")
    return lambda step: u * SCHEDULES[schedule](step)
