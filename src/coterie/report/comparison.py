"""The arms of one run, their table, and the sentence that says which came out ahead."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from coterie.report.tables import format_bytes, format_count, format_number, format_rate


@dataclass
class Arm:
    """One trained model and what was measured of it.

    Args:
        label: how the table and the headline call it: "dense", "MoE".
        total_parameters: all parameters.
        active_parameters: parameters one token passes through.
        tokens: tokens seen in training.
        held_out: bits per byte on held-out text, after training.
        tokens_per_second: in training.
        peak_memory: bytes; None where it was not measured.
        imbalance: load of the busiest expert over the mean, worst layer; None for a dense model.
        entropy: mean routing entropy in nats; None for a dense model.
        steps: training steps at which `train` was read, rising.
        train: bits per byte of the training batch at each of `steps`.
        eval_steps: training steps at which `eval` was read, rising.
        eval: bits per byte on held-out text at each of `eval_steps`.
    """

    label: str
    total_parameters: int
    active_parameters: int
    tokens: int
    held_out: float
    tokens_per_second: float
    peak_memory: int | None = None
    imbalance: float | None = None
    entropy: float | None = None
    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    eval: list[float] = field(default_factory=list)


def compare(arms: Sequence[Arm]) -> tuple[list[str], list[list[str]]]:
    """The table of a run: one column per arm, one row per measurement.

    Returns: (columns, rows) as `print_table` takes them.

    >>> columns, rows = compare([Arm("MoE", 5_020_000, 1_430_000, 4_000_000, 1.8126, 8430)])
    >>> columns, rows[0], rows[3]
    (['', 'MoE'], ['total parameters', '5.02 M'], ['held-out bits per byte', '1.813'])
    """
    rows = [
        ["total parameters", *(format_count(a.total_parameters) for a in arms)],
        ["active parameters per token", *(format_count(a.active_parameters) for a in arms)],
        ["training tokens", *(format_count(a.tokens) for a in arms)],
        ["held-out bits per byte", *(format_number(a.held_out, 3) for a in arms)],
        ["training tokens per second", *(format_rate(a.tokens_per_second) for a in arms)],
        ["peak memory", *(format_bytes(a.peak_memory) for a in arms)],
        ["worst expert load, max / mean", *(format_number(a.imbalance) for a in arms)],
        ["routing entropy, nats", *(format_number(a.entropy) for a in arms)],
    ]
    return ["", *(a.label for a in arms)], rows


def headline(arms: Sequence[Arm]) -> str:
    """What the run shows, win or lose, in one or two sentences.

    Args:
        arms: the baseline first, the method last; one arm alone is just stated.

    Raises:
        ValueError: there is no arm.

    >>> dense = Arm("dense", 1_430_000, 1_430_000, 4_000_000, 1.874, 9100)
    >>> moe = Arm("MoE", 5_020_000, 1_432_000, 4_000_000, 1.9, 8430)
    >>> headline([dense, moe]).split(". ")[1]
    'It needs 1.4% more bits: the dense model is ahead.'
    """
    if not arms:
        raise ValueError("a report without arms; give at least one")
    base, method = arms[0], arms[-1]
    start = f"The {method.label} reaches {format_number(method.held_out, 3)} bits per byte on held-out text"
    if base is method:
        return f"{start}."
    return (
        f"{start}, the {base.label} model {format_number(base.held_out, 3)}, "
        f"{_budgets(method, base)}. {_verdict(method, base)}"
    )


def _budgets(method: Arm, base: Arm) -> str:
    parts = []
    for name, ours, theirs in (
        ("active parameters", method.active_parameters, base.active_parameters),
        ("tokens", method.tokens, base.tokens),
    ):
        same = abs(ours - theirs) <= 0.01 * theirs
        parts.append((name, same, f"{format_count(ours)} {name} against {format_count(theirs)}"))
    if all(same for _, same, _ in parts):
        return "at the same active parameters and tokens"
    return "at " + " and ".join(f"the same {name}" if same else differ for name, same, differ in parts)


def _verdict(method: Arm, base: Arm) -> str:
    more = method.held_out / base.held_out - 1
    if format_number(method.held_out, 3) == format_number(base.held_out, 3):
        return "The two are level."
    if more < 0:
        return f"It needs {-more:.1%} fewer bits."
    return f"It needs {more:.1%} more bits: the {base.label} model is ahead."
