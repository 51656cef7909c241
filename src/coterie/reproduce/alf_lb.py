"""Three experiments, from the theory to training; each arm's name says which.

fixed: the scores of 2048 tokens for 16 experts, two per token, drawn once: sigmoid(1.5 z C / √8 + b), with
normal z and C and with b from -1 to 1, so that some experts are wanted far more than others. The bias moves
2000 times. Here the theory is exact, and what it says is checked at every step: the identity for the change
of the dual; that tokens only move to less loaded experts; and that an expert's load, once it has crossed its
share, stays within the number of tokens that one step can move. The optimum comes from alternating quantiles.

online: 1000 fresh batches of 1024 tokens from the same source. Regret is against the best fixed bias, found
on 200 000 other tokens; its growth is what is added after step 300.

train: a decoder, 48 wide, two layers of 16 SwiGLU experts 32 wide, sigmoid gate, on the `mixed_markov` text:
400 steps of 16 sequences of 64 tokens. MaxVio is over the whole validation set, in the worst layer.

The paper trains a DeepSeekMoE of 1 billion parameters. With `--data`, scores that your own router gave (.npy
files of [tokens, experts], one or a folder of them) are replayed in `fixed` and drawn from in `online`; or
the decoder is trained on your text. The margins were set for the built-in data.
"""

import functools
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from coterie.data import VOCAB_SIZE as BYTES
from coterie.language.alf_lb import (
    Rule,
    dual_value,
    max_violation,
    proportional_rule,
    regret,
    replay,
    sign_rule,
    solve_assignment,
)
from coterie.language.router_scores import draw_scores, pick_scores, read_scores
from coterie.language.scored_text import scored_text
from coterie.reproduce import Budget, Card, Claim, Plot, Values
from coterie.reproduce.balanced_decoder import Text, train_decoder
from coterie.reproduce.claims import Numbers

CARD = Card(
    slug="alf-lb",
    title="A Theoretical Framework for Auxiliary-Loss-Free Load Balancing of Sparse Mixture-of-Experts in "
    "Large-Scale AI Models",
    authors="Han, Zhong",
    year=2025,
    venue="arXiv 2512.03915",
    area="language",
    methods=("loss-free balancing", "expert bias", "primal-dual", "online learning", "regret"),
    problem="What does moving a selection bias after each step guarantee about the balance of experts, and "
    "which step sizes are right?",
    headline="As a one-step primal-dual method it improves a Lagrangian monotonically, moves tokens only "
    "from more to less loaded experts, balances approximately, and has logarithmic expected regret. (The "
    "procedure's own paper, Wang et al. 2024: perplexity 9.50 against 9.56 with an auxiliary loss, at 1B.)",
)

TOP_K = 2


def fixed(seed: int, budget: Budget, data: "Data | None", *, rule: Rule) -> Values:
    """Balances the same scores again and again; checks the theory at every step."""
    tokens, steps = {"smoke": (256, 60), "standard": (2048, 2000), "full": (8192, 4000)}[budget]
    theirs = data.scores if data else []
    scores_TE = theirs[seed % len(theirs)] if theirs else draw_scores(seed, tokens)
    best = dual_value(scores_TE, solve_assignment(scores_TE, TOP_K), TOP_K)
    path = list(replay(scores_TE, TOP_K, rule, steps))
    balanced = TOP_K * len(scores_TE) / scores_TE.shape[1]
    errors_NE = torch.stack([step.loads_E for step in path]).double() - balanced
    crossed_NE = (errors_NE.sign() != errors_NE[0].sign()).cummax(0).values
    reach = max(step.near for step in path)
    unexplained = math.fsum(abs(step.change - (step.benefit - step.gain)) for step in path)
    violations = [max_violation(step.loads_E) for step in path]
    shown = [n for n in range(1, steps + 1) if n <= 20 or n % 10 == 0]
    return {
        "MaxVio at first": violations[0],
        "MaxVio of the last 100": sum(violations[-100:]) / len(violations[-100:]),
        "worst load error, tokens": float(errors_NE[-100:].abs().max()),
        "dual over optimum": abs(path[-1].dual / best - 1),
        "load error over reach": float((errors_NE.abs() * crossed_NE).max()) / reach,
        "moves to a busier expert": sum(step.preference_violations for step in path),
        "identity error": unexplained / math.fsum(abs(step.change) for step in path),
        "unexplained rises": sum(step.change > 1e-9 and step.benefit <= step.gain for step in path),
        "MaxVio by iteration": [(n, violations[n - 1]) for n in shown],
        "dual over optimum by iteration": [(n, max(path[n - 1].dual / best - 1, 1e-12)) for n in shown],
    }


def online(seed: int, budget: Budget, data: "Data | None", *, rule: Rule) -> Values:
    """Meets fresh scores at every step; pays for each against the best fixed bias."""
    tokens, steps = {"smoke": (128, 40), "standard": (1024, 1000), "full": (1024, 5000)}[budget]
    pool_TE = torch.cat(data.scores) if data and data.scores else None
    best_E = solve_assignment(pool_TE, TOP_K) if pool_TE is not None else best_fixed_bias(seed, budget)
    bias_E, total, grown = torch.zeros_like(best_E), 0.0, 0.0
    violations, path = [], []
    for n in range(1, steps + 1):
        if pool_TE is None:
            batch_TE = draw_scores(seed, tokens, batch=n)
        else:
            batch_TE = pick_scores(pool_TE, tokens, seed=10_000 * seed + n)
        loads_E = (batch_TE + bias_E).topk(TOP_K, dim=-1).indices.flatten().bincount(minlength=len(bias_E))
        price = regret(batch_TE, bias_E, best_E, TOP_K)
        total, grown = total + price, grown + price * (n > 0.3 * steps)
        violations.append(max_violation(loads_E))
        path.append((n, total))
        bias_E = bias_E + rule(loads_E, n)
    return {
        "growth of regret": grown,
        "regret": total,
        "MaxVio of the last 100": sum(violations[-100:]) / len(violations[-100:]),
        "regret by batch": path[:: max(1, steps // 250)],
    }


ARMS = {
    "fixed/sign-1e-3": partial(fixed, rule=sign_rule(1e-3)),
    "fixed/sign-1e-2": partial(fixed, rule=sign_rule(1e-2)),
    "fixed/sign-1e-2-sqrt": partial(fixed, rule=sign_rule(1e-2, "sqrt")),
    "fixed/proportional-0.8": partial(fixed, rule=proportional_rule(0.8, TOP_K)),
    "online/none": partial(online, rule=sign_rule(0.0)),
    "online/sign-1e-2": partial(online, rule=sign_rule(1e-2)),
    "online/sign-1e-2-sqrt": partial(online, rule=sign_rule(1e-2, "sqrt")),
    "online/proportional-4-inverse": partial(online, rule=proportional_rule(4.0, TOP_K, "inverse")),
    "train/none": train_decoder,
    "train/aux-1e-2": partial(train_decoder, balance=1e-2),
    "train/aux-1e-1": partial(train_decoder, balance=1e-1),
    "train/sign-5e-3": partial(train_decoder, rule=sign_rule(5e-3)),
    "train/sign-5e-2-sqrt": partial(train_decoder, rule=sign_rule(5e-2, "sqrt")),
}

FIXED = [arm for arm in ARMS if arm.startswith("fixed/")]
each_seed = partial(Claim, over="each seed")
log_log = partial(Plot, log_x=True, log_y=True)

CLAIMS = [
    each_seed(
        "fixed: without a bias the busiest expert has at least twice its share (MaxVio ≥ 1)",
        lambda arms: arms["fixed/sign-1e-3"]["MaxVio at first"],
        at_least=1.0,
    ),
    each_seed(
        "fixed: the sign rule at 1e-3 balances: mean MaxVio of the last 100 iterations",
        lambda arms: floor(arms, "sign-1e-3"),
        at_most=0.05,
    ),
    each_seed(
        "fixed: and no expert is further than 15 of 256 tokens from its share",
        lambda arms: arms["fixed/sign-1e-3"]["worst load error, tokens"],
        at_most=15,
    ),
    each_seed(
        "fixed: at a constant 1e-2 the floor of MaxVio is at least 4 times that at 1e-2/√n",
        lambda arms: floor(arms, "sign-1e-2") / floor(arms, "sign-1e-2-sqrt"),
        at_least=4,
    ),
    each_seed(
        "preference rule: no token ever moves to an expert that is as busy, under any rule",
        lambda arms: max(arms[arm]["moves to a busier expert"] for arm in FIXED),
        at_most=0,
        budget="smoke",
    ),
    each_seed(
        "Lagrangian: its change is switching benefit - Σ step · (L - load), relative error under any rule",
        lambda arms: max(arms[arm]["identity error"] for arm in FIXED),
        at_most=1e-6,
        budget="smoke",
    ),
    each_seed(
        "Lagrangian: it never rises while the switching benefit is the smaller, under any rule",
        lambda arms: max(arms[arm]["unexplained rises"] for arm in FIXED),
        at_most=0,
        budget="smoke",
    ),
    each_seed(
        "approximate balance: after crossing its share, a load stays within what one sign step can move",
        lambda arms: max(arms[arm]["load error over reach"] for arm in FIXED if "sign" in arm),
        at_most=1,
        budget="smoke",
    ),
    each_seed(
        "fixed: the dual ends within 0.01% of the optimum, at 1e-3 and at 1e-2/√n",
        lambda arms: max(arms[f"fixed/sign-{u}"]["dual over optimum"] for u in ("1e-3", "1e-2-sqrt")),
        at_most=1e-4,
    ),
    each_seed(
        "online: without a bias, regret grows by at least 20 from step 300 to 1000",
        lambda arms: growth(arms, "none"),
        at_least=20,
    ),
    each_seed(
        "online: at a constant sign step of 1e-2 it goes on growing, by at least 0.3",
        lambda arms: growth(arms, "sign-1e-2"),
        at_least=0.3,
    ),
    each_seed(
        "online: at 1e-2/√n it grows by at most 0.15 of that",
        lambda arms: growth(arms, "sign-1e-2-sqrt") / growth(arms, "sign-1e-2"),
        at_most=0.15,
    ),
    each_seed(
        "online: and so with a proportional step of 4/n, the schedule of logarithmic regret",
        lambda arms: growth(arms, "proportional-4-inverse") / growth(arms, "sign-1e-2"),
        at_most=0.15,
    ),
    Claim(
        "train: both bias schedules bring MaxVio under a fifth of that without balancing",
        lambda arms: worst_balance(arms) / arms["train/none"]["MaxVio"],
        at_most=0.2,
    ),
    Claim(
        "train: and to that of an auxiliary loss of 0.1, or at most 0.05 above",
        lambda arms: worst_balance(arms) - arms["train/aux-1e-1"]["MaxVio"],
        at_most=0.05,
    ),
    Claim(
        "train: at no more cross-entropy than the auxiliary loss of 0.1, give or take 0.015 nats",
        lambda arms: (
            arms["train/sign-5e-3"]["cross-entropy, nats"] - arms["train/aux-1e-1"]["cross-entropy, nats"]
        ),
        at_most=0.015,
    ),
]

PLOTS = [
    log_log("MaxVio by iteration", "iteration", "MaxVio", "fixed: a constant step leaves a floor."),
    log_log(
        "dual over optimum by iteration",
        "iteration",
        "D / D* - 1",
        "fixed: the distance from the optimal assignment.",
    ),
    Plot(
        "regret by batch",
        "batch",
        "regret per token, summed",
        "online: constant steps pay for ever; 4/n pays about as much per tenfold of batches. Without a bias, "
        "regret leaves the frame.",
        log_x=True,
        arms=("online/sign-1e-2", "online/sign-1e-2-sqrt", "online/proportional-4-inverse"),
    ),
    Plot(
        "MaxVio of the batch by step",
        "training step",
        "MaxVio, worst layer",
        "train: of each batch by itself, so that even a balanced router shows the noise of 1024 tokens.",
        log_y=True,
    ),
    Plot(
        "loss and balance",
        "MaxVio",
        "validation cross-entropy, nats",
        "train: down and left is better.",
        points=True,
    ),
]


def floor(arms: Numbers, rule: str) -> float:
    return arms[f"fixed/{rule}"]["MaxVio of the last 100"]


def growth(arms: Numbers, rule: str) -> float:
    return arms[f"online/{rule}"]["growth of regret"]


def worst_balance(arms: Numbers) -> float:
    """MaxVio of the worse of the two bias schedules."""
    return max(arms["train/sign-5e-3"]["MaxVio"], arms["train/sign-5e-2-sqrt"]["MaxVio"])


@functools.lru_cache(maxsize=1)
def best_fixed_bias(seed: int, budget: Budget) -> Tensor:
    """p* of the source that `online` draws from, on tokens that it never sees."""
    tokens, sweeps = {"smoke": (2000, 50), "standard": (200_000, 100), "full": (1_000_000, 200)}[budget]
    return solve_assignment(draw_scores(seed, tokens, batch=10**6), TOP_K, sweeps=sweeps)


@dataclass
class Data:
    """The user's own: scores [tokens, experts], one tensor per file; or text for a decoder."""

    scores: list[Tensor] = field(default_factory=list)
    text: Text | None = None


def read_data(path: Path) -> Data:
    """Scores from .npy files, one or a folder of them; otherwise text, one file or a folder.

    Raises:
        ValueError: what `read_scores` refuses, or too little text.
    """
    if path.suffix == ".npy" or (path.is_dir() and any(path.glob("*.npy"))):
        return Data(scores=read_scores(path, TOP_K))
    return Data(text=(BYTES, *scored_text(path, 64, batch_size=16)))
