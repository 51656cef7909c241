"""Papers, re-run: one file per paper with its card, its arms and its claims.

A whole paper file, `reproduce/fair_coins.py`; its slug is `fair-coins`:

    '''How the paper is re-run here, for the reader of its page: data, sizes, what differs from the paper.'''

    import random
    from functools import partial
    from typing import Any

    from coterie.reproduce import Budget, Card, Claim, Plot, Values

    CARD = Card(                       # literals only: cards are listed without importing their files
        slug="fair-coins",
        title="A Law of Large Numbers for Coins",
        authors="Bernoulli",
        year=1713,
        venue="Ars Conjectandi",
        area="language",
        methods=("averaging",),
        problem="How far from one half does the share of heads stay after n tosses?",
        headline="The deviation shrinks with the number of tosses.",
    )


    def toss(seed: int, budget: Budget, data: Any, *, tosses: int) -> Values:
        rng, heads, path = random.Random(seed), 0, []
        for n in range(1, tosses * {"smoke": 1, "standard": 10, "full": 100}[budget] + 1):
            heads += rng.random() < 0.5
            path.append((n, abs(heads / n - 0.5)))
        return {"deviation": path[-1][1], "deviation by tosses": path}


    ARMS = {"few": partial(toss, tosses=10), "many": partial(toss, tosses=1000)}

    CLAIMS = [
        Claim(
            "many tosses deviate at most 0.3 times as much as few",
            lambda arms: arms["many"]["deviation"] / arms["few"]["deviation"],
            at_most=0.3,
        ),
        Claim("many tosses come close on every seed", lambda arms: arms["many"]["deviation"],
              at_most=0.05, over="each seed"),
    ]

    PLOTS = [Plot("deviation by tosses", x="tosses", y="|share of heads - 1/2|", log_x=True)]

What may be added: `SEEDS = 5`, seeds of a standard run when that is not 3; and
`def read_data(path: Path) -> Any`, which reads the user's file for `--data` or raises ValueError saying which
column or field is missing. Its return value is every arm's `data`, which is None without `--data`.

An arm that trains calls `coterie.reproduce.train`, which is `coterie.train.fit` made to fit in here.
"""

from coterie.reproduce.card import Card
from coterie.reproduce.claims import Claim, Outcome
from coterie.reproduce.experiment import (
    BUDGETS,
    Arm,
    Budget,
    Experiment,
    Plot,
    Values,
    find_papers,
    load,
    read_card,
    search,
    train,
)

__all__ = [
    "BUDGETS",
    "Arm",
    "Budget",
    "Card",
    "Claim",
    "Experiment",
    "Outcome",
    "Plot",
    "Values",
    "find_papers",
    "load",
    "read_card",
    "search",
    "train",
]
