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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from coterie.data import VOCAB_SIZE as BYTES
from coterie.language import mixed_markov as text
from coterie.language.alf_lb import (
    BiasUpdate,
    Rule,
    check_scores,
    dual_value,
    max_violation,
    proportional_rule,
    regret,
    replay,
    sign_rule,
    solve_assignment,
)
from coterie.language.scored_text import scored_text
from coterie.models import Decoder, DecoderConfig
from coterie.nn import LinearScore, MoE, Monitor, Router, SwiGLUExperts, TopK
from coterie.nn.balance import load_balance
from coterie.reproduce import Budget, Card, Claim, Plot, Values, train
from coterie.reproduce.claims import Numbers
from coterie.train import LossOutput, evaluate

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

EXPERTS, TOP_K, DIM = 16, 2, 48
Text = tuple[int, Dataset[Any], Dataset[Any]]  # vocabulary size, training, validation


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
    return {
        "MaxVio at first": violations[0],
        "MaxVio of the last 100": sum(violations[-100:]) / len(violations[-100:]),
        "worst load error, tokens": float(errors_NE[-100:].abs().max()),
        "dual over optimum": abs(path[-1].dual / best - 1),
        "load error over reach": float((errors_NE.abs() * crossed_NE).max()) / reach,
        "moves to a busier expert": sum(step.preference_violations for step in path),
        "identity error": unexplained / math.fsum(abs(step.change) for step in path),
        "unexplained rises": sum(step.change > 1e-9 and step.benefit <= step.gain for step in path),
        "MaxVio by iteration": [(n, v) for n, v in enumerate(violations, 1) if n <= 20 or n % 10 == 0],
        "dual over optimum by iteration": [
            (n, max(step.dual / best - 1, 1e-12)) for n, step in enumerate(path, 1) if n <= 20 or n % 10 == 0
        ],
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
            generator = torch.Generator().manual_seed(10_000 * seed + n)
            batch_TE = pool_TE[torch.randint(len(pool_TE), (tokens,), generator=generator)]
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


def trained(
    seed: int, budget: Budget, data: "Data | None", *, rule: Rule | None = None, balance: float = 0.0
) -> Values:
    """Trains a decoder with a bias rule, with an auxiliary loss of weight `balance`, or with neither."""
    steps, sequences = {"smoke": (4, 32), "standard": (400, 1500), "full": (2000, 6000)}[budget]
    vocabulary, training, validation = data.text if data and data.text else draw_text(seed, sequences)
    config = DecoderConfig(vocabulary, DIM, layers=2, heads=4, kv_heads=4, head_dim=12, hidden=0)
    model = Decoder(config, make_ffn)
    penalty = (lambda routings: balance * load_balance(routings)) if balance else None
    history = train(
        model,
        training,
        loss=text.scored_loss(penalty),
        steps=steps,
        batch_size=16,
        lr=3e-3,
        warmup_steps=min(50, steps // 2),
        weight_decay=0.01,
        callbacks=[BiasUpdate(rule)] if rule else [],
        seed=seed,
    )
    monitor, loss = Monitor(), text.scored_loss()

    def watched(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
        output = loss(model, batch)
        monitor.update(output.routings)
        return output

    cross_entropy = evaluate(model, validation, watched, batch_size=64)["cross_entropy"]
    violation = max(map(max_violation, monitor.loads))
    loads = [load_E.double() / load_E.double().mean() for load_E in monitor.loads]
    return {
        "cross-entropy, nats": cross_entropy,
        "MaxVio": violation,
        "MinLoad": min(float(load_E.min()) for load_E in loads),
        "experts under 0.1 L": sum(int((load_E < 0.1).sum()) for load_E in loads),
        "MaxVio of the batch by step": [
            (step, imbalance - 1)
            for step, imbalance in zip(history.step, history.imbalance, strict=True)
            if imbalance is not None and (step <= 20 or step % 5 == 0)
        ],
        "loss and balance": [(violation, cross_entropy)],
    }


def make_ffn(layer: int) -> MoE:
    """A layer of the trained decoder. Its bias stays at zero in the arms without a rule."""
    select = TopK(TOP_K, gate="sigmoid", bias=torch.zeros(EXPERTS))
    return MoE(Router(LinearScore(DIM, EXPERTS), select), SwiGLUExperts(EXPERTS, DIM, 32))


ARMS = {
    "fixed/sign-1e-3": partial(fixed, rule=sign_rule(1e-3)),
    "fixed/sign-1e-2": partial(fixed, rule=sign_rule(1e-2)),
    "fixed/sign-1e-2-sqrt": partial(fixed, rule=sign_rule(1e-2, "sqrt")),
    "fixed/proportional-0.8": partial(fixed, rule=proportional_rule(0.8, TOP_K)),
    "online/none": partial(online, rule=sign_rule(0.0)),
    "online/sign-1e-2": partial(online, rule=sign_rule(1e-2)),
    "online/sign-1e-2-sqrt": partial(online, rule=sign_rule(1e-2, "sqrt")),
    "online/proportional-4-inverse": partial(online, rule=proportional_rule(4.0, TOP_K, "inverse")),
    "train/none": trained,
    "train/aux-1e-2": partial(trained, balance=1e-2),
    "train/aux-1e-1": partial(trained, balance=1e-1),
    "train/sign-5e-3": partial(trained, rule=sign_rule(5e-3)),
    "train/sign-5e-2-sqrt": partial(trained, rule=sign_rule(5e-2, "sqrt")),
}

FIXED = [arm for arm in ARMS if arm.startswith("fixed/")]

each_seed = partial(Claim, over="each seed")

CLAIMS = [
    each_seed(
        "fixed: without a bias the busiest expert has at least twice its share (MaxVio ≥ 1)",
        lambda arms: arms["fixed/sign-1e-3"]["MaxVio at first"],
        at_least=1.0,
    ),
    each_seed(
        "fixed: the sign rule at 1e-3 balances: mean MaxVio of the last 100 iterations",
        lambda arms: arms["fixed/sign-1e-3"]["MaxVio of the last 100"],
        at_most=0.05,
    ),
    each_seed(
        "fixed: and no expert is further than 15 of 256 tokens from its share",
        lambda arms: arms["fixed/sign-1e-3"]["worst load error, tokens"],
        at_most=15,
    ),
    each_seed(
        "fixed: at a constant 1e-2 the floor of MaxVio is at least 4 times that at 1e-2/√n",
        lambda arms: (
            arms["fixed/sign-1e-2"]["MaxVio of the last 100"]
            / arms["fixed/sign-1e-2-sqrt"]["MaxVio of the last 100"]
        ),
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
        lambda arms: max(
            arms["fixed/sign-1e-3"]["dual over optimum"], arms["fixed/sign-1e-2-sqrt"]["dual over optimum"]
        ),
        at_most=1e-4,
    ),
    each_seed(
        "online: without a bias, regret grows by at least 20 from step 300 to 1000",
        lambda arms: arms["online/none"]["growth of regret"],
        at_least=20,
    ),
    each_seed(
        "online: at a constant sign step of 1e-2 it goes on growing, by at least 0.3",
        lambda arms: arms["online/sign-1e-2"]["growth of regret"],
        at_least=0.3,
    ),
    each_seed(
        "online: at 1e-2/√n it grows by at most 0.15 of that",
        lambda arms: (
            arms["online/sign-1e-2-sqrt"]["growth of regret"] / arms["online/sign-1e-2"]["growth of regret"]
        ),
        at_most=0.15,
    ),
    each_seed(
        "online: and so with a proportional step of 4/n, the schedule of logarithmic regret",
        lambda arms: (
            arms["online/proportional-4-inverse"]["growth of regret"]
            / arms["online/sign-1e-2"]["growth of regret"]
        ),
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
    Plot(
        "MaxVio by iteration",
        "iteration",
        "MaxVio",
        "fixed: a constant step leaves a floor.",
        log_x=True,
        log_y=True,
    ),
    Plot(
        "dual over optimum by iteration",
        "iteration",
        "D / D* - 1",
        "fixed: the distance from the optimal assignment.",
        log_x=True,
        log_y=True,
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


def worst_balance(arms: Numbers) -> float:
    """MaxVio of the worse of the two bias schedules."""
    return max(arms["train/sign-5e-3"]["MaxVio"], arms["train/sign-5e-2-sqrt"]["MaxVio"])


def draw_scores(seed: int, tokens: int, batch: int = 0) -> Tensor:
    """Scores [tokens, 16] of a router with strong preferences; a seed's batches share the router."""
    router = np.random.default_rng(seed).standard_normal((8, EXPERTS))
    z_TD = np.random.default_rng([seed, 1 + batch]).standard_normal((tokens, 8))
    logits_TE = 1.5 * z_TD @ router / math.sqrt(8) + np.linspace(-1, 1, EXPERTS)
    return torch.from_numpy(logits_TE).sigmoid()


@functools.lru_cache(maxsize=1)
def best_fixed_bias(seed: int, budget: Budget) -> Tensor:
    """p* of the source that `online` draws from, on tokens that it never sees."""
    tokens, sweeps = {"smoke": (2000, 50), "standard": (200_000, 100), "full": (1_000_000, 200)}[budget]
    return solve_assignment(draw_scores(seed, tokens, batch=10**6), TOP_K, sweeps=sweeps)


def draw_text(seed: int, sequences: int) -> Text:
    """Sequences of 64 tokens."""
    training = TensorDataset(*text.mixed_markov(sequences, 64, seed=100 + seed))
    return text.VOCAB_SIZE, training, TensorDataset(*text.mixed_markov(min(sequences, 200), 64, seed=999))


@dataclass
class Data:
    """The user's own: scores [tokens, experts], one tensor per file; or text as `draw_text` returns it."""

    scores: list[Tensor] = field(default_factory=list)
    text: Text | None = None


def read_data(path: Path) -> Data:
    """Scores from .npy files, one or a folder of them; otherwise text, one file or a folder.

    Raises:
        ValueError: a file is no array of finite numbers [tokens, experts], files differ in the number of
            experts, or there is too little text.
    """
    files = sorted(path.glob("*.npy")) if path.is_dir() else [path] * (path.suffix == ".npy")
    if not files:
        return Data(text=(BYTES, *scored_text(path, 64, batch_size=16)))
    scores = [read_scores(file) for file in files]
    widths = {scores_TE.shape[1] for scores_TE in scores}
    if len(widths) > 1:
        raise ValueError(f"{path} holds scores over {sorted(widths)} experts; give files of one router")
    return Data(scores=scores)


def read_scores(file: Path) -> Tensor:
    """[tokens, experts] float64 from a .npy file; ValueError if it is none."""
    try:
        array = np.load(file, allow_pickle=False)
        return check_scores(torch.from_numpy(array.astype(np.float64)), TOP_K)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}; should be numpy.save of floats [tokens, experts]") from None
