"""What a paper's file offers, and how the files are found: by listing this folder, importing none of them."""

import ast
import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.reproduce.card import Card
from coterie.reproduce.claims import BUDGETS, Budget, Claim

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from coterie.train import History

__all__ = ["BUDGETS", "Arm", "Budget", "Experiment", "Plot", "Values"]

# A number is compared by claims and averaged in tables; a curve, a list of (x, y), is drawn by plots.
Values = Mapping[str, float | Sequence[tuple[float, float]]]

# (seed, budget, data) → what was measured; data is what the file's read_data returned, None without --data
Arm = Callable[[int, Budget, Any], Values]


@dataclass(frozen=True)
class Plot:
    """A drawing of one curve, a line per arm that has it: its mean over seeds, in the range of the seeds.

    Args:
        curve: its name among an arm's values, and the drawing's title.
        x: name of the axis, with its unit.
        y: the same.
        note: what a reader should see in it.
        log_x: a logarithmic axis.
        log_y: the same.
        points: draw every seed's points, not lines: for a curve of one (x, y) per arm and seed.
        arms: only these, in this order; () for all that have the curve.
    """

    curve: str
    x: str
    y: str
    note: str = ""
    log_x: bool = False
    log_y: bool = False
    points: bool = False
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """A paper's file, loaded.

    Args:
        card: CARD.
        arms: ARMS: the method, the paper's main baseline, the key ablations. Names without commas or
            spaces; those with the same text before a "/" stand in one table of that title.
        claims: CLAIMS.
        plots: PLOTS.
        about: the file's docstring: data, sizes, and what differs from the paper.
        seeds: SEEDS of a standard run, 3 unless said otherwise.
        read_data: what reads the user's file for `--data`; None if the file defines none.
    """

    card: Card
    arms: Mapping[str, Arm]
    claims: Sequence[Claim]
    plots: Sequence[Plot]
    about: str
    seeds: int = 3
    read_data: Callable[[Path], Any] | None = None


def find_papers(folder: Path = Path(__file__).parent) -> dict[str, Path]:
    """slug → file, in alphabetical order: every file in the folder that assigns CARD."""
    files = sorted(folder.glob("*.py"))
    return {file.stem.replace("_", "-"): file for file in files if _card_of(file) is not None}


def read_card(file: Path) -> Card:
    """The card of a paper's file, read without running it.

    Raises:
        ValueError: the file has no `CARD = Card(...)`, or one with anything but literals.
    """
    call = _card_of(file)
    if call is None:
        raise ValueError(f"{file} assigns no CARD; a paper's file has CARD = Card(slug=..., ...)")
    try:
        fields = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return Card(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file}, line {call.lineno}: CARD should be Card(...) of literals: {error}"
        ) from None


def search(query: str = "") -> list[Card]:
    """The cards that match every word of the query, by slug."""
    return [card for card in map(read_card, find_papers().values()) if card.matches(query)]


def load(slug: str) -> Experiment:
    """Imports a paper's file. ValueError for an unknown slug, naming the closest."""
    check_slug(slug)
    module = importlib.import_module(f"coterie.reproduce.{slug.replace('-', '_')}")
    return experiment_of(module)


def experiment_of(module: Any) -> Experiment:
    """The experiment that a module (or any object with these attributes) describes."""
    return Experiment(
        card=module.CARD,
        arms=module.ARMS,
        claims=module.CLAIMS,
        plots=getattr(module, "PLOTS", ()),
        about=(module.__doc__ or "").strip(),
        seeds=getattr(module, "SEEDS", 3),
        read_data=getattr(module, "read_data", None),
    )


def check_slug(slug: str) -> None:
    """ValueError unless there is a paper of this slug."""
    check_name("paper", slug, list(find_papers()))


def check_name(kind: str, name: str, known: Sequence[str]) -> None:
    """ValueError, with the closest known name, unless the name is known."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        some = ", ".join(known) if len(known) <= 12 else ", ".join([*known[:12], "…"])
        hint = f"did you mean {close[0]}?" if close else f"use one of {some}"
        raise ValueError(f"no {kind} {name!r}; {hint}")


def train(model: "nn.Module", data: "Dataset[Any]", **options: Any) -> "History":
    """`coterie.train.fit` inside an arm: no progress of its own, and Ctrl-C ends the arm.

    Args:
        model: as `fit` takes it.
        data: the same.
        **options: the same.

    Raises KeyboardInterrupt where `fit` returns an interrupted history: an arm that was cut short must not
    be taken for one that finished.
    """
    from coterie.train import fit

    history = fit(model, data, progress=False, **options)
    if history.interrupted:
        raise KeyboardInterrupt
    return history


def _card_of(file: Path) -> ast.Call | None:
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "CARD" for t in node.targets
        ):
            return node.value if isinstance(node.value, ast.Call) else None
    return None
