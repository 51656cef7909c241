"""A paper's statements as inequalities, and what became of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# arm → name of a number → its value
Numbers = Mapping[str, Mapping[str, float]]

BUDGETS = ("smoke", "standard", "full")
Budget = Literal["smoke", "standard", "full"]

HOLDS = "holds"
FAILS = "does not hold"
NOT_TESTED = "not tested"


@dataclass(frozen=True)
class Claim:
    """One statement of a paper that the arms' numbers can contradict.

    Args:
        text: the statement with its margin, as a sentence a reader can judge.
        measure: from the arms' numbers to the one that is compared: `lambda arms: arms["ours"]["loss"]`.
        at_least: the required margin.
        at_most: the required margin; exactly one of the two is given.
        over: "mean": `measure` sees each number's mean over seeds. "each seed": it sees one seed after the
            other, and the worst of them is compared.
        budget: the smallest budget that can test it.
        note: where the statement differs from the paper's, or, if it does not hold, what was tried.

    Raises ValueError unless exactly one margin is given.

    >>> claim = Claim("b is below half of a", lambda arms: arms["b"]["x"] / arms["a"]["x"], at_most=0.5)
    >>> seeds = [{"a": {"x": 1.0}, "b": {"x": 0.4}}, {"a": {"x": 2.0}, "b": {"x": 0.6}}]
    >>> outcome = claim.judge(seeds, "standard")
    >>> outcome.verdict, round(outcome.measured, 3), outcome.required, round(outcome.margin, 3)
    ('holds', 0.333, '≤ 0.5', 0.167)
    """

    text: str
    measure: Callable[[Numbers], float]
    at_least: float | None = None
    at_most: float | None = None
    over: Literal["mean", "each seed"] = "mean"
    budget: Budget = "standard"
    note: str = ""

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"claim {self.text!r}: give either at_least or at_most")

    @property
    def required(self) -> str:
        """The comparison and its margin: "≤ 0.5"."""
        return f"≤ {self.at_most:g}" if self.at_least is None else f"≥ {self.at_least:g}"

    def judge(self, seeds: Sequence[Numbers], budget: Budget, left_out: Sequence[str] = ()) -> "Outcome":
        """Compares.

        Args:
            seeds: for each seed, the numbers of the arms that ran.
            budget: that they ran at. Below the claim's own, the measure is still taken, so that a smoke run
                proves that it can be, but no verdict is given.
            left_out: arms that did not run; a claim that asks for one is not tested.
        """
        asked = [_mean(seeds)] if self.over == "mean" else seeds
        try:
            values = [self._measure(_Ran(numbers, left_out)) for numbers in asked]
        except _LeftOut as arm:
            return Outcome(self.text, f"{NOT_TESTED} without {arm}", None, self.required, None, self.note)
        worst = max(values, key=self._missing)
        margin = -self._missing(worst)
        verdict = HOLDS if margin >= 0 else FAILS
        if BUDGETS.index(budget) < BUDGETS.index(self.budget):
            verdict = f"{NOT_TESTED} at this budget"
        if not math.isfinite(worst):
            return Outcome(self.text, verdict, None, self.required, None, self.note)
        return Outcome(self.text, verdict, worst, self.required, margin, self.note)

    def _measure(self, arms: Numbers) -> float:
        try:
            return float(self.measure(arms))
        except ZeroDivisionError:  # a share of nothing: no number, and so nothing that holds
            return math.nan

    def _missing(self, measured: float) -> float:
        """How much is missing to the required margin; negative when there is some to spare."""
        if not math.isfinite(measured):
            return math.inf
        if self.at_most is not None:
            return measured - self.at_most
        assert self.at_least is not None
        return self.at_least - measured


@dataclass(frozen=True)
class Outcome:
    """What became of a claim.

    Args:
        text, required, note: the claim's.
        verdict: "holds", "does not hold", "not tested at this budget", or "not tested without ARM".
        measured: the compared number; None where an arm was left out, or a ratio is to 0.
        margin: how far inside the requirement it lies; negative when outside.
    """

    text: str
    verdict: str
    measured: float | None
    required: str
    margin: float | None
    note: str = ""


class _LeftOut(LookupError):
    pass


class _Ran(dict[str, Mapping[str, float]]):
    """The arms that ran. Asking for one that was left out says so; for one that never was, is a KeyError."""

    def __init__(self, numbers: Numbers, left_out: Sequence[str]) -> None:
        super().__init__(numbers)
        self.left_out = left_out

    def __missing__(self, arm: str) -> Mapping[str, float]:
        raise _LeftOut(arm) if arm in self.left_out else KeyError(arm)


def _mean(seeds: Sequence[Numbers]) -> Numbers:
    return {
        arm: {name: math.fsum(numbers[arm][name] for numbers in seeds) / len(seeds) for name in values}
        for arm, values in seeds[0].items()
    }
