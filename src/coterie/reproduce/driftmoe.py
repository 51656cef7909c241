"""Two streams, test then train; each arm's name says which.

sea: 4 concepts of 2500 rows, abrupt, no noise: river's SEA variants 0, 1, 3, and 0 again. led: 24 binary
attributes, 10% of them inverted, of which 1, 3, 5, then 7 change places, 4 times 1500 rows. Everything has 12
Hoeffding trees or one, with a grace period of 50 and δ = 1e-7; of the 12, three learn a row.

The paper's streams have a million rows and its router steps every 256; here every 32, with an arm that keeps
256. Its code feeds raw features to the router; here they are standardised online, with an arm that leaves
them raw. `single-tree` is river's; `random-routing` has the same pool behind random logits; in `all-learn`
all 12 trees learn every row, and so stay one tree. `arf` is river's adaptive random forest of ten trees: not
claimed about. `--data` replaces SEA by a stream of your own, CSV or ARFF, its label last or named class.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.data import led_drift, read_stream, sea_drift
from coterie.reproduce import Budget, Card, Claim, Plot, Values

if TYPE_CHECKING:
    from coterie.stream import DriftMoEClassifier

CARD = Card(
    slug="driftmoe",
    title="DriftMoE: A Mixture of Experts Approach to Handle Concept Drifts",
    authors="Aspis et al.",
    year=2025,
    venue="arXiv 2507.18464",
    area="stream",
    methods=("concept drift", "Hoeffding trees", "online router", "multi-hot mask", "prequential"),
    problem="Can a small pool of incremental trees behind a learned router replace a large ensemble with "
    "drift detectors on a stream that changes?",
    headline="Competitive with adaptive ensembles of the state of the art on nine benchmarks, with about 12 "
    "trees and no drift detector.",
    code="https://github.com/miguel-ceadar/drift-moe",
)
SEEDS = 5

TREE: dict[str, Any] = {"grace_period": 50, "delta": 1e-7}
WINDOW = 250  # rows of the sliding accuracy


def run(seed: int, budget: Budget, data: Any, *, stream: str, model: Callable[[int], Any]) -> Values:
    """Predicts, scores and learns a stream row by row."""
    from coterie.stream import PrequentialScore

    segment = {"sea": 2500, "led": 1500}[stream]
    segment = {"smoke": 30, "standard": segment, "full": 4 * segment}[budget]
    rows: Iterable[Any] = sea_drift(segment, seed=seed) if stream == "sea" else led_drift(segment, seed=seed)
    drifts: Sequence[int] = [segment, 2 * segment, 3 * segment]
    if data is not None and stream == "sea":
        rows, drifts = islice(data, 120 if budget == "smoke" else None), []
    window = min(WINDOW, segment)
    classifier, score = model(seed), PrequentialScore(window, drifts)
    right, curve = [], []
    for x, y in rows:
        predicted = classifier.predict_one(x)
        score.update(y, predicted)
        right.append(predicted is not None and predicted == y)
        classifier.learn_one(x, y)
        if score.rows % window == 0:
            curve.append((score.rows, score.window_accuracy))
    last = right[len(right) * 3 // 4 :]
    values = {
        "accuracy": sum(right) / len(right),
        "accuracy, last quarter": sum(last) / len(last),
        "kappa-M": score.values()["kappa_m"],
        "windowed accuracy": curve,
    }
    usage = getattr(classifier, "usage_", None)
    return values if usage is None else {**values, "largest share of an expert": float(usage.max())}


def driftmoe(seed: int, **options: Any) -> "DriftMoEClassifier":
    """12 trees of which 3 learn, unless the options say otherwise."""
    from coterie.stream import DriftMoEClassifier

    return DriftMoEClassifier(**TREE, seed=seed, **options)


def random_routing(seed: int) -> "DriftMoEClassifier":
    """The same pool, its router's logits replaced by noise."""
    import numpy as np

    from coterie.stream import DriftMoEClassifier, OnlineRouter

    class RandomRouter(OnlineRouter):
        def logits(self, x: Any) -> Any:
            return self.rng.normal(size=self.num_experts).astype(np.float32)

    class RandomRouting(DriftMoEClassifier):
        def _new_router(self, features: int, experts: int) -> OnlineRouter:
            return RandomRouter(features, experts, (1,), lr=self.lr, batch=32, rng=self._rng)

    return RandomRouting(**TREE, seed=seed)


def single_tree(seed: int) -> Any:
    """river's Hoeffding tree."""
    from river.tree import HoeffdingTreeClassifier

    return HoeffdingTreeClassifier(**TREE)


def arf(seed: int) -> Any:
    """river's adaptive random forest."""
    from river.forest import ARFClassifier

    return ARFClassifier(n_models=10, seed=seed)


def read_data(path: Path) -> list[Any]:
    """Rows of a CSV, TSV, Parquet or ARFF file; the label is the column named class, else the last."""
    first = next(iter(read_stream(path, rows_at_once=1)))[0]
    return list(read_stream(path, "class" if "class" in first else None))


def _arms(stream: str, models: dict[str, Callable[[int], Any]]) -> dict[str, Any]:
    return {f"{stream}/{name}": partial(run, stream=stream, model=model) for name, model in models.items()}


_BOTH: dict[str, Callable[[int], Any]] = {
    "driftmoe-32": partial(driftmoe, router_batch=32),
    "driftmoe-256": partial(driftmoe, router_batch=256),
    "best-mask": partial(driftmoe, router_batch=32, mask="best"),
    "random-routing": random_routing,
    "single-tree": single_tree,
}
_SEA: dict[str, Callable[[int], Any]] = {
    **_BOTH,
    "raw-features": partial(driftmoe, router_batch=32, scale=False),
    "all-learn": partial(driftmoe, router_batch=32, top_k=12),
    "task": partial(driftmoe, mode="task"),
    "arf": arf,
}
ARMS = _arms("sea", _SEA) | _arms("led", _BOTH)

CLAIMS = [
    Claim(
        "SEA: DriftMoE is at least 0.003 more accurate than a single tree",
        lambda arms: arms["sea/driftmoe-32"]["accuracy"] - arms["sea/single-tree"]["accuracy"],
        at_least=0.003,
    ),
    Claim(
        "SEA: the router gives at least 0.02 over random routing",
        lambda arms: arms["sea/driftmoe-32"]["accuracy"] - arms["sea/random-routing"]["accuracy"],
        at_least=0.02,
    ),
    Claim(
        "SEA: when the first concept recurs, DriftMoE is at least 0.005 more accurate than a single tree",
        lambda arms: (
            arms["sea/driftmoe-32"]["accuracy, last quarter"]
            - arms["sea/single-tree"]["accuracy, last quarter"]
        ),
        at_least=0.005,
    ),
    Claim(
        "SEA: where all trees learn, they are one tree: at most 1e-3 from it, on every seed",
        lambda arms: abs(arms["sea/all-learn"]["accuracy"] - arms["sea/single-tree"]["accuracy"]),
        at_most=1e-3,
        over="each seed",
    ),
    Claim(
        "SEA: no expert answers more than 0.6 of the rows, on any seed",
        lambda arms: arms["sea/driftmoe-32"]["largest share of an expert"],
        at_most=0.6,
        over="each seed",
    ),
    Claim(
        "LED: DriftMoE is at least 0.05 more accurate than a single tree",
        lambda arms: arms["led/driftmoe-32"]["accuracy"] - arms["led/single-tree"]["accuracy"],
        at_least=0.05,
    ),
]

PLOTS = [
    Plot(
        "windowed accuracy",
        x="rows",
        y=f"accuracy of the last {WINDOW} rows",
        arms=("sea/driftmoe-32", "sea/single-tree", "sea/random-routing", "sea/arf"),
        note="SEA; the concept changes at 2500, 5000 and 7500, where the first one returns.",
    ),
]
