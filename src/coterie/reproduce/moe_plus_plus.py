"""Rows of eleven types, of which three need no feed-forward expert: do slots go where they are needed?

Half of the rows are easy (the target is x, 2 x or x + c), half are one of eight random two-layer functions of
x; a one-hot tells the type. Two layers of h + MoE(RMSNorm h), 32 wide, with eight GELU experts and, for
MoE++, two constant, one copy and one zero expert; a linear gate. Top-2, capacity factor 1.1 while training,
1000 steps on fresh batches of 512 rows, mean squared error plus 0.01 times the balance loss of each layer.
The test is on 8192 rows, without a capacity.

The paper pre-trains language models of 0.6 to 7 billion parameters. Types stand in for its tokens here, so
that "needs computation" is known for each row. Its capacity counts tokens where slots are meant, which would
drop half of all choices at top-2; slots are counted here. Its gain in quality over the plain MoE is not
claimed, nor any of gating residuals, which two layers cannot show.

Easy targets are what a block with a residual path can give without a feed-forward expert: by a zero, a copy
and a constant expert. With the targets 0, x and c instead, which were tried first, x must be cancelled on the
residual path, and only feed-forward experts can: which types used them was then a matter of the seed.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from coterie.language.moe_plus_plus import moe_plus_plus, routing_loss
from coterie.nn import LimitCapacity, LinearScore, MLPExperts, MoE, Router, Routing, TopK, balance
from coterie.reproduce import Budget, Card, Claim, Plot, Values, train
from coterie.train import LossFn, LossOutput

CARD = Card(
    slug="moe-plus-plus",
    title="MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts",
    authors="Jin et al.",
    year=2025,
    venue="ICLR 2025",
    area="language",
    methods=(
        "zero-computation experts",
        "zero expert",
        "copy expert",
        "constant expert",
        "gating residuals",
        "heterogeneous load balance",
        "per-expert capacity",
        "top-k",
    ),
    problem="Does every token need two feed-forward experts, or can easy ones be passed on at no cost?",
    headline="1.1 to 2.1 times the expert forward throughput of a vanilla MoE of the same size, with better "
    "results: at 0.6B parameters, an average of 45.6 against 44.3 at τ = 0.75.",
    code="https://github.com/SkyworkAI/MoE-plus-plus",
)

EASY, TYPES, WIDTH, DIM, FFN = 3, 11, 16, 32, 8
STEPS = {"smoke": 5, "standard": 1000, "full": 4000}
BETA = 0.01


def run(seed: int, budget: Budget, data: Any, *, tau: float | None, gating_residual: bool = True) -> Values:
    """One arm; `tau` None is the MoE without zero-cost experts."""
    steps, rows = STEPS[budget], 8192 if budget != "smoke" else 512
    torch.manual_seed(seed)
    model = Regressor([_moe(tau, gating_residual and layer > 0) for layer in range(2)])
    history = train(
        model,
        TypedRegression(steps, rows=512, seed=seed + 1),
        loss=_loss(tau),
        steps=steps,
        batch_size=1,
        lr=3e-3,
        warmup_steps=min(50, steps),
        weight_decay=0.01,
        seed=seed,
    )
    every = max(steps // 50, 1)
    return {
        **_test(model.eval(), *typed_regression(rows, seed=10_000_000)),
        "training error by step": list(
            zip(history.step[::every], map(float, history.cross_entropy[::every]), strict=True)
        ),
    }


ARMS = {
    "vanilla": partial(run, tau=None),
    "tau-0.75": partial(run, tau=0.75),
    "tau-0.25": partial(run, tau=0.25),
    "tau-0.1": partial(run, tau=0.1),
    "tau-0.75-no-residual": partial(run, tau=0.75, gating_residual=False),
}

CLAIMS = [
    Claim(
        "MoE++ (τ = 0.75) is level with the MoE of the same size: its error is at most 1.05 times as large",
        lambda arms: arms["tau-0.75"]["error"] / arms["vanilla"]["error"],
        at_most=1.05,
    ),
    Claim(
        "MoE++ (τ = 0.75) uses at most 1.5 feed-forward experts per token, where the MoE uses 2",
        lambda arms: arms["tau-0.75"]["FFN experts per token"],
        at_most=1.5,
    ),
    Claim(
        "a smaller τ uses fewer feed-forward experts: 0.25 at least 0.2 per token fewer than 0.75",
        lambda arms: arms["tau-0.75"]["FFN experts per token"] - arms["tau-0.25"]["FFN experts per token"],
        at_least=0.2,
    ),
    Claim(
        "and 0.1 at least 0.05 per token fewer than 0.25",
        lambda arms: arms["tau-0.25"]["FFN experts per token"] - arms["tau-0.1"]["FFN experts per token"],
        at_least=0.05,
    ),
    Claim(
        "hard rows use at least 0.08 more feed-forward experts than easy ones at τ = 0.75, on every seed",
        lambda arms: arms["tau-0.75"]["hard − easy"],
        at_least=0.08,
        over="each seed",
        note="With the easy targets 0, x and c, hard rows used 0.69, -0.03 and 0.89 more on seeds 0 to 2.",
    ),
    Claim(
        "and at least 0.25 more at τ = 0.25, on every seed",
        lambda arms: arms["tau-0.25"]["hard − easy"],
        at_least=0.25,
        over="each seed",
        note="With the easy targets 0, x and c, hard rows used 0.70, -0.03 and 0.90 more on seeds 0 to 2.",
    ),
    Claim(
        "too small a τ costs quality: at 0.1 the error is at least 1.15 times that at 0.75",
        lambda arms: arms["tau-0.1"]["error"] / arms["tau-0.75"]["error"],
        at_least=1.15,
    ),
]

PLOTS = [
    Plot(
        "error by FFN experts",
        x="feed-forward experts per token",
        y="test mean squared error",
        points=True,
        note="Left is cheaper, down is better. τ moves MoE++ along the curve.",
    ),
    Plot(
        "FFN experts by type",
        x="type of row: 0 to 2 easy, 3 to 10 hard",
        y="feed-forward experts per token",
        note="Easy rows are passed on; τ decides how many of the hard ones are too.",
    ),
    Plot("training error by step", x="step", y="training mean squared error", log_y=True),
]


def typed_regression(rows: int, seed: int, *, tables_seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of eleven types with their targets.

    With probability one half one of three easy types: target x, 2 x, or x + c for a fixed c; otherwise one of
    eight hard ones: target 1.5 tanh(x W₁) W₂ with W₁ [16, 24], W₂ [24, 16] fixed per type.

    Args:
        rows: R.
        seed: of the rows.
        tables_seed: of c and all W₁, W₂; the same for training and test.

    Returns: inputs [R, 16 + 11] (x and the one-hot type), targets [R, 16], types [R] int64, below 3 if easy.

    >>> inputs, targets, types = typed_regression(100, seed=0)
    >>> inputs.shape, bool((targets[types == 0] == inputs[types == 0, :16]).all())
    (torch.Size([100, 27]), True)
    """
    tables = torch.Generator().manual_seed(tables_seed)
    c = torch.randn(WIDTH, generator=tables)
    first = torch.randn(TYPES - EASY, WIDTH, 24, generator=tables) * 2 / math.sqrt(WIDTH)
    second = torch.randn(TYPES - EASY, 24, WIDTH, generator=tables) / math.sqrt(24)
    rng = torch.Generator().manual_seed(seed)
    x, easy = torch.randn(rows, WIDTH, generator=rng), torch.rand(rows, generator=rng) < 0.5
    hard_type = torch.randint(EASY, TYPES, (rows,), generator=rng)
    types = torch.where(easy, torch.randint(EASY, (rows,), generator=rng), hard_type)
    targets = torch.stack([x, 2 * x, x + c])[types.clamp(max=2), torch.arange(rows)]
    for kind in range(EASY, TYPES):
        mine = types == kind
        targets[mine] = 1.5 * (x[mine] @ first[kind - EASY]).tanh() @ second[kind - EASY]
    return torch.cat([x, F.one_hot(types, TYPES).to(x)], dim=1), targets, types


class TypedRegression(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Item i is a fresh batch of `typed_regression`; no two are alike."""

    def __init__(self, batches: int, *, rows: int, seed: int) -> None:
        self.batches, self.rows, self.seed = batches, rows, seed

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return typed_regression(self.rows, seed=self.seed * 100_000 + index)


class Regressor(nn.Module):
    """Inputs [..., 27] to predictions [..., 16] and routings; layers of h + MoE(RMSNorm h)."""

    def __init__(self, layers: Sequence[MoE]) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(WIDTH + TYPES, DIM), nn.Linear(DIM, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in layers)

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Routing]]:
        h, routings = self.read(inputs), list[Routing]()
        for moe, norm in zip(self.layers, self.norms, strict=True):
            y, routing = moe(norm(h), **({"previous": routings[-1]} if routings else {}))
            h = h + y
            routings.append(routing)
        return self.write(h), routings


def _moe(tau: float | None, gating_residual: bool) -> MoE:
    bank = MLPExperts(FFN, DIM, DIM, bias=False)
    if tau is None:
        layer = MoE(LimitCapacity(Router(LinearScore(DIM, FFN), TopK(2)), 1.1, training_only=True), bank)
    else:
        layer = moe_plus_plus(bank, DIM, tau=tau, gating_residual=gating_residual)
    for module in layer.router.modules():  # type: ignore[attr-defined]
        if isinstance(module, LinearScore):
            nn.init.normal_(module.weight, std=0.02)
    return layer


def _loss(tau: float | None) -> LossFn:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> LossOutput:
        inputs, targets, _ = batch
        predicted, routings = model(inputs)
        error = F.mse_loss(predicted, targets)
        if tau is None:
            penalty = BETA * len(routings) * balance.load_balance(routings)
        else:
            penalty = routing_loss(routings, FFN, tau=tau, beta=BETA)
        return LossOutput(error + penalty, error.detach(), inputs.shape[:-1].numel(), routings)

    return loss


@torch.no_grad()
def _test(model: nn.Module, inputs: Tensor, targets: Tensor, types: Tensor) -> Values:
    predicted, routings = model(inputs)
    used = torch.stack([r.narrow(0, FFN).slots_per_token.double() for r in routings]).mean(0)
    error, mean = F.mse_loss(predicted, targets).item(), used.mean().item()
    return {
        "error": error,
        "FFN experts per token": mean,
        "hard − easy": (used[types >= EASY].mean() - used[types < EASY].mean()).item(),
        "error by FFN experts": [(mean, error)],
        "FFN experts by type": [(float(k), used[types == k].mean().item()) for k in range(TYPES)],
    }
