"""What a run of a paper measured: kept as JSON, shown as tables, lines and verdicts."""

import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from coterie.report import format_duration, print_table
from coterie.report.plots import Line
from coterie.reproduce.claims import FAILS, HOLDS, Budget, Numbers, Outcome
from coterie.reproduce.experiment import Plot, Values


@dataclass
class Result:
    """One run of a paper.

    Args:
        slug: the paper's.
        budget: "smoke", "standard" or "full".
        seeds: that were run.
        arms: arm → what it measured, seed by seed.
        seconds: arm → wall time, seed by seed; interruptions between them do not count.
        claims: what became of each.
        provenance: how it was made: command, data, versions, machine.
    """

    slug: str
    budget: Budget
    seeds: list[int]
    arms: dict[str, list[Values]]
    seconds: dict[str, list[float]]
    claims: list[Outcome]
    provenance: dict[str, str]

    @property
    def holds(self) -> bool:
        """False when a claim does not hold; one that was not tested does not count."""
        return all(outcome.verdict != FAILS for outcome in self.claims)

    @property
    def headline(self) -> str:
        """The verdicts in a sentence."""
        verdicts = [outcome.verdict for outcome in self.claims]
        held, failed = verdicts.count(HOLDS), verdicts.count(FAILS)
        rest = len(verdicts) - held - failed
        if rest == len(verdicts):
            return f"None of {rest} claims was tested."
        said = [f"{held} of {len(verdicts)} claims {'holds' if held == 1 else 'hold'}"]
        if failed:
            said.append(f"{failed} {'does' if failed == 1 else 'do'} not")
        if rest:
            said.append(f"{rest} {'was' if rest == 1 else 'were'} not tested")
        return ", ".join(said) + "."

    @property
    def wall_time(self) -> str:
        """Of all arms and seeds together."""
        return format_duration(math.fsum(second for each in self.seconds.values() for second in each))

    def numbers(self) -> list[Numbers]:
        """For each seed: arm → name → number, as claims see them."""
        return [
            {arm: numbers_of(values[seed]) for arm, values in self.arms.items()}
            for seed in range(len(self.seeds))
        ]

    def to_json(self) -> str:
        """Everything, curves included; `from_json` turns it back."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=1, allow_nan=False)
        # a line per point, not four, of files that are committed
        return re.sub(r"\[\n\s*([^\s\[\]]+),\n\s*([^\s\[\]]+)\n\s*\]", r"[\1, \2]", text)

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """The result that `to_json` wrote."""
        content = json.loads(text)
        content["claims"] = [Outcome(**outcome) for outcome in content["claims"]]
        return cls(**content)

    def summary(self) -> dict[str, Any]:
        """What `--json` prints: slug, claims, and each arm's numbers without its curves."""
        fields = ("text", "verdict", "measured", "required")
        return {
            "slug": self.slug,
            "claims": [{name: getattr(outcome, name) for name in fields} for outcome in self.claims],
            "arms": {
                arm: {
                    name: {"mean": statistics.fmean(each), "sd": _sd(each), "seeds": each}
                    for name, each in _by_name(values).items()
                }
                for arm, values in self.arms.items()
            },
        }


def numbers_of(values: Values) -> dict[str, float]:
    """The numbers among an arm's values; curves are left out."""
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def arm_tables(arms: Mapping[str, list[Values]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) per group of arms: mean ± sd over seeds, a column per arm, or a row where arms
    outnumber what is measured.

    The title is what comes before the "/" of the arms' names, "" if there is none.
    """
    groups: dict[str, dict[str, dict[str, list[float]]]] = {}
    for arm, values in arms.items():
        title, _, name = arm.rpartition("/")
        groups.setdefault(title, {})[name] = _by_name(values)
    tables = []
    for title, group in groups.items():
        names = list(dict.fromkeys(name for measured in group.values() for name in measured))
        columns = [["", *names]] + [
            [arm, *(mean_and_sd(measured[name]) if name in measured else "–" for name in names)]
            for arm, measured in group.items()
        ]
        lines = columns if len(group) > len(names) else [list(line) for line in zip(*columns, strict=True)]
        if names:
            tables.append((title, lines[0], lines[1:]))
    return tables


def print_result(result: Result) -> None:
    """Arms, claims and wall time, on standard output."""
    for title, columns, rows in arm_tables(result.arms):
        print_table(f"{result.slug}{title and f', {title}'}", columns, rows)
        print()
    rows = [[o.text, o.verdict, format_measured(o.measured), o.required] for o in result.claims]
    print_table("claims", ["", "verdict", "measured", "required"], rows)
    seeds = f"{len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}"
    print(f"\n{result.headline}\n{result.budget} budget, {seeds}, wall time {result.wall_time}")
    sys.stdout.flush()


def lines_of(plot: Plot, arms: Mapping[str, list[Values]]) -> list[Line]:
    """A plot's lines: for each arm with the curve its mean over seeds, as far as all go, in their range."""
    lines = []
    drawn = [arm for arm in plot.arms or arms if plot.curve in arms.get(arm, [{}])[0]]
    short = [arm.rpartition("/")[2] for arm in drawn]
    for arm, label in zip(drawn, short if len({*short}) == len(short) else drawn, strict=True):
        curves = [_curve(values, plot.curve) for values in arms[arm]]
        if plot.points:
            points = [point for curve in curves for point in curve]
            lines.append(Line(label, [x for x, _ in points], [y for _, y in points]))
            continue
        together = list(zip(*curves, strict=False))
        xs, ys = ([[point[i] for point in at] for at in together] for i in (0, 1))
        band = ([min(y) for y in ys], [max(y) for y in ys]) if len(curves) > 1 else ([], [])
        lines.append(Line(label, [statistics.fmean(x) for x in xs], [statistics.fmean(y) for y in ys], *band))
    return lines


def mean_and_sd(values: Sequence[float]) -> str:
    """Three digits of the mean, up to five to show a small standard deviation; none where all seeds agree.

    >>> mean_and_sd([0.861, 0.901]), mean_and_sd([41.0, 44.0]), mean_and_sd([20.11, 20.14])
    ('0.881 ± 0.028', '42.5 ± 2.1', '20.12 ± 0.02')
    >>> mean_and_sd([2.5]), mean_and_sd([481.0, 481.0]), mean_and_sd([0.0, 0.0])
    ('2.50', '481', '0')
    """
    mean, sd = statistics.fmean(values), _sd(values)
    if not any(values):
        return "0"
    if abs(mean) < 1e-4 or abs(mean) >= 1e6:
        return f"{mean:.2e}" + (f" ± {sd:.0e}" if sd else "")
    digits = max(0, 2 - math.floor(math.log10(abs(mean))))
    if 0 < sd < 0.5 * 10**-digits:
        digits = min(digits + 2, -math.floor(math.log10(sd)))
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd else "")


def format_measured(value: float | None) -> str:
    """Three digits of a compared number; a dash where none was taken.

    >>> format_measured(0.0181), format_measured(1258.0), format_measured(None)
    ('0.0181', '1258', '–')
    """
    if value is None:
        return "–"
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def _by_name(values: Sequence[Values]) -> dict[str, list[float]]:
    return {name: [numbers_of(each)[name] for each in values] for name in numbers_of(values[0])}


def _curve(values: Values, name: str) -> Sequence[tuple[float, float]]:
    curve = values[name]
    assert not isinstance(curve, (int, float))
    return curve


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
