"""A paper in three lines, for the tests of the frame.

Arms write a line into the file LOG names, so that tests see which ran.
"""

import os
from pathlib import Path
from typing import Any

from coterie.reproduce import Budget, Card, Claim, Plot, Values

CARD = Card(
    slug="toy",
    title="On <Toys>",
    authors="Doe",
    year=2024,
    venue="Nowhere",
    area="language",
    methods=("toys",),
    problem="Is b below a?",
    headline="b is half of a.",
)


def ran() -> list[str]:
    """Which (arm, seed) ran, in order."""
    return Path(os.environ["LOG"]).read_text().splitlines() if Path(os.environ["LOG"]).exists() else []


def measure(name: str, scale: float):
    def arm(seed: int, budget: Budget, data: Any) -> Values:
        if os.environ.get("INTERRUPT") == f"{name} {seed}":
            raise KeyboardInterrupt
        with Path(os.environ["LOG"]).open("a") as log:
            log.write(f"{name} {seed}\n")
        value = scale * (seed + 1) * (data or 1)
        return {"x": value, "size": len(budget), "x by step": [(1, value), (2, value / 2)]}

    return arm


ARMS = {"a": measure("a", 2.0), "b": measure("b", 1.0)}

CLAIMS = [
    Claim("b is at most 0.6 of a", lambda arms: arms["b"]["x"] / arms["a"]["x"], at_most=0.6),
    Claim(
        "a is at least 3 on every seed",
        lambda arms: arms["a"]["x"],
        at_least=3,
        over="each seed",
        note="tried",
    ),
    Claim("b is positive", lambda arms: arms["b"]["x"], at_least=0, budget="smoke"),
    Claim("only a full run could tell", lambda arms: arms["a"]["x"], at_least=1e9, budget="full"),
]

PLOTS = [Plot("x by step", x="step", y="x"), Plot("nothing has this", x="step", y="y")]


def read_data(path: Path) -> float:
    """A file with a number."""
    return float(path.read_text())
