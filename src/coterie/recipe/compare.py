"""`coterie compare`: several recipes on the same text at the same cost, side by side."""

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from coterie.models import active_parameters, forward_flops
from coterie.recipe.build import build
from coterie.recipe.measure import HELDOUT_WINDOWS, routed_sample, sample
from coterie.recipe.options import suggest
from coterie.recipe.recipe import Recipe
from coterie.recipe.train import corpora_of, train_method
from coterie.report import print_table
from coterie.report.html import write_whole
from coterie.report.paper import Drawing, PaperPage, Table, write_paper_page
from coterie.report.plots import line_plot
from coterie.reproduce.experiment import Plot, Values
from coterie.reproduce.results import arm_tables, lines_of, numbers_of
from coterie.reproduce.run import environment, identity, measure_arms
from coterie.train import evaluate, language_model_loss

EQUAL = ("active", "flops", "steps")
CURVE = Plot("held-out bits per byte by step", x="step", y="bits per byte")


@dataclass
class Comparison:
    """What `compare_recipes` measured.

    Args:
        values: recipe → what it measured, seed by seed.
        seconds: recipe → wall time, seed by seed.
        seeds: that were run.
        recipes: as they were trained, after the cost was made equal.
        equal: what was made equal.
    """

    values: dict[str, list[Values]]
    seconds: dict[str, list[float]]
    seeds: list[int]
    recipes: dict[str, Recipe]
    equal: str

    @property
    def headline(self) -> str:
        """Who came out ahead, and by how much, in a sentence."""
        means = {
            name: statistics.fmean(numbers_of(each)["held-out bits per byte"] for each in values)
            for name, values in self.values.items()
        }
        best, *others = sorted(means, key=lambda name: means[name])
        if not others:
            return f"{best} reaches {means[best]:.3f} bits per byte on held-out text."
        return (
            f"{best} needs the fewest bits per byte on held-out text, {means[best]:.3f}; "
            f"next is {others[0]}, {means[others[0]]:.3f}."
        )

    def to_json(self) -> str:
        """Everything, recipes included."""
        content = {
            "equal": self.equal,
            "seeds": self.seeds,
            "arms": self.values,
            "seconds": self.seconds,
            "recipes": {name: recipe.to_yaml() for name, recipe in self.recipes.items()},
            **environment(),
        }
        return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)


def compare_recipes(
    recipes: Sequence[Recipe],
    *,
    equal: str = "active",
    seeds: int = 1,
    out: str | Path = "coterie-compare",
    progress: bool | None = None,
) -> Comparison:
    """Trains each recipe on each seed, at the cost of the first, and writes `results.json` and `report.html`.

    Costs are measured, not computed from k: a tenth of the training shows how many experts a token of
    each recipe uses, since top-p or zero-cost experts have no fixed number. Then

    - "active" makes the active parameters equal, by the width of the experts (of the feed-forward network of
      a dense recipe);
    - "flops" makes the FLOPs of training equal, by the number of steps;
    - "steps" changes nothing: the recipes as they are.

    The columns say what each had in the end. Finished trainings are kept in `out` until the whole is
    finished; after Ctrl-C the same call goes on.

    Args:
        recipes: with different names, and the same text, held-out share and window length.
        equal: "active", "flops" or "steps".
        seeds: how many, counted up from each recipe's own.
        out: a folder.
        progress: show a progress bar; None shows it on a terminal, plain lines elsewhere.

    Raises:
        ValueError: recipes that cannot be compared, an unknown `equal`, a cost that no width reaches.
    """
    _check(recipes, equal, seeds)
    out = Path(out)
    kept = out / "trainings"
    key = identity(
        [equal, *(recipe.to_yaml() for recipe in recipes)], [Path(p) for r in recipes for p in r.text]
    )
    chosen = _at_equal_cost(recipes, equal, kept, key)
    arms: dict[str, Callable[[int], Values]] = {name: partial(_train, r) for name, r in chosen.items()}
    numbers = list(range(seeds))
    values, seconds = measure_arms("compare", arms, numbers, kept, key, progress)
    result = Comparison(values, seconds, [recipes[0].train.seed + n for n in numbers], chosen, equal)
    write_whole(out / "results.json", result.to_json())
    write_paper_page(out / "report.html", _page(result))
    shutil.rmtree(kept)
    return result


def print_comparison(result: Comparison, out: Path) -> None:
    """Table, headline and where everything lies, on standard output."""
    for _, columns, rows in arm_tables(result.values):
        print_table(f"compared at equal {_EQUAL_TO[result.equal]}", columns, rows)
    print(f"\n{result.headline}\n\nreport      {out / 'report.html'}\nresults     {out / 'results.json'}")
    sys.stdout.flush()


_EQUAL_TO = {"active": "active parameters", "flops": "training FLOPs", "steps": "steps"}


def _check(recipes: Sequence[Recipe], equal: str, seeds: int) -> None:
    if equal not in EQUAL:
        raise ValueError(f"equal={equal!r}; {suggest(equal, EQUAL)}")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}; should be at least 1")
    if not recipes:
        raise ValueError("no recipe to compare; give at least one")
    first, names = recipes[0], [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise ValueError(f"recipes are called {', '.join(names)}; each needs a name of its own (`name:`)")
    for recipe in recipes[1:]:
        for what in ("text", "heldout", "seq_len"):
            theirs, ours = (getattr(r if what == "text" else r.train, what) for r in (recipe, first))
            if theirs != ours:
                raise ValueError(
                    f"{recipe.name} has {what} {theirs!r} but {first.name} {ours!r}; "
                    "what is compared must be measured on the same text"
                )


def _at_equal_cost(recipes: Sequence[Recipe], equal: str, kept: Path, key: str) -> dict[str, Recipe]:
    if equal == "steps":
        return {recipe.name: recipe for recipe in recipes}
    pilots = {f"pilot {r.name}": partial(_pilot, r) for r in recipes}
    values, _ = measure_arms("short trainings, to measure costs", pilots, [0], kept, key, False)
    costs = [numbers_of(pilot) for (pilot,) in values.values()]
    first, base = recipes[0], costs[0]
    chosen = {}
    for recipe, cost in zip(recipes, costs, strict=True):
        if equal == "flops":
            flops = first.train.steps * base["FLOPs of a step"]
            steps = max(1, round(flops / cost["FLOPs of a step"]))
            chosen[recipe.name] = replace(recipe, train=replace(recipe.train, steps=steps))
            continue
        name, width = _width(recipe)
        wanted = round(width + (base["active"] - cost["active"]) / cost["active per unit of width"])
        if wanted < 1:
            raise ValueError(
                f"{recipe.name} has {cost['active']:,.0f} active parameters at {name}={width}; no width "
                f"brings it to the {base['active']:,.0f} of {first.name}: give it fewer experts per token"
            )
        chosen[recipe.name] = replace(recipe, model={**recipe.model, name: wanted})
    return chosen


def _width(recipe: Recipe) -> tuple[str, int]:
    config = recipe.config
    return ("expert_hidden", config.expert_hidden) if config.num_experts else ("hidden", config.hidden)


def _pilot(recipe: Recipe, seed: int) -> Values:
    """Active parameters and FLOPs of a recipe after a tenth of its training."""
    short = replace(recipe, train=replace(recipe.train, steps=max(20, recipe.train.steps // 10)))
    train, heldout = corpora_of(short)
    torch.manual_seed(short.train.seed)
    method = build(short)
    train_method(short, method, train, heldout, progress=False)
    _, routings = routed_sample(method.model, heldout, 128)
    name, width = _width(recipe)
    wider = build(replace(recipe, model={**recipe.model, name: width + 1})).model
    active = active_parameters(method.model, routings)
    tokens = recipe.train.batch_size * recipe.train.seq_len
    return {
        "active": active,
        "active per unit of width": active_parameters(wider, routings) - active,
        "FLOPs of a step": 3 * tokens * forward_flops(method.model, routings, recipe.train.seq_len),
    }


def _train(recipe: Recipe, seed: int) -> Values:
    recipe = replace(recipe, train=replace(recipe.train, seed=recipe.train.seed + seed))
    how = recipe.train
    train, heldout = corpora_of(recipe)
    set_seed(how.seed)
    method = build(recipe)
    history = train_method(recipe, method, train, heldout, progress=False)
    if history.interrupted:
        raise KeyboardInterrupt
    scores = evaluate(method.model, sample(heldout, HELDOUT_WINDOWS), language_model_loss(), how.batch_size)
    _, routings = routed_sample(method.model, heldout, HELDOUT_WINDOWS // 8)
    flops = 3 * sum(history.tokens) * forward_flops(method.model, routings, how.seq_len)
    slots = [float(r.slots_per_token.double().mean()) for r in routings]
    routed = {}
    if slots:  # a dense model has neither
        routed["slots used per token"] = sum(slots) / len(slots)
        routed["worst expert load, max / mean"] = scores["imbalance"]
    return {
        "held-out bits per byte": scores["bits_per_token"],
        "total parameters, M": method.model.num_parameters() / 1e6,
        "active parameters, M": active_parameters(method.model, routings) / 1e6,
        "training FLOPs, T": flops / 1e12,
        **routed,
        "training tokens per second": history.tokens_per_second,
        CURVE.curve: [(e["step"], e["bits_per_token"]) for e in history.evals],
    }


def _page(result: Comparison) -> PaperPage:
    def draw(width: float, height: float) -> str:
        return line_plot(lines_of(CURVE, result.values), x=CURVE.x, y=CURVE.y, width=width, height=height)

    first = next(iter(result.recipes.values()))
    return PaperPage(
        title="compare · Coterie",
        kicker=f"Coterie · {len(result.recipes)} recipes at equal {_EQUAL_TO[result.equal]}",
        headline=result.headline,
        lead=[f"Text: {', '.join(first.text) or 'the Python standard library’s own sources'}."],
        claims=[],
        tables=[Table(*table) for table in arm_tables(result.values)],
        measured_note="Mean ± standard deviation over the seeds." if len(result.seeds) > 1 else "One seed.",
        drawings=[Drawing(CURVE.curve, "", draw(8.0, 3.8), draw(4.4, 3.6))],
        about=[f"{name}: {_in_words(recipe)}" for name, recipe in result.recipes.items()],
        provenance={"seeds": ", ".join(map(str, result.seeds)), **environment()},
    )


def _in_words(recipe: Recipe) -> str:
    said: Mapping[str, Any] = {
        "model": recipe.model,
        "router": recipe.router,
        "score": recipe.score,
        "experts": recipe.experts,
        "system": recipe.system,
        "loss": recipe.loss,
        "steps": recipe.train.steps,
    }
    return "; ".join(f"{key} {value}" for key, value in said.items() if value)
