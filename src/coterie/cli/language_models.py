"""Commands that train language models on one's own text."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.app import RESUMES, app, interruptible

train_app = typer.Typer(help="Train a model of your own.", no_args_is_help=True)
app.add_typer(train_app, name="train")


@train_app.command("lm", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train_lm(
    context: typer.Context,
    router: Annotated[str | None, typer.Option(help="Such as top-k, top-p, hash.")] = None,
    experts: Annotated[str | None, typer.Option(help="Such as swiglu, mlp.")] = None,
    system: Annotated[str | None, typer.Option(help="A published system, such as moe-plus-plus.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="File or folder to learn from; repeat for more. Default: Python's own sources."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for model and report.")] = Path("coterie-lm"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Train a language model put together from named parts: coterie train lm [RECIPE.yaml] [OPTIONS].

    Options win over the recipe. Any option of a part can be given, as in --router.p 0.4 --train.steps 500.
    `coterie train parts` lists them all.
    """
    from coterie.recipe import Recipe
    from coterie.recipe.train import print_trained
    from coterie.recipe.train import train_lm as train

    named = {"router": router, "experts": experts, "system": system, "text": text}
    overrides: list[tuple[str, object]] = [(key, value) for key, value in named.items() if value]
    recipes, options = _part_options(context.args)
    overrides += options
    what: Recipe | None = None
    if recipes:
        what = Recipe.read(recipes[0], overrides)
    elif overrides or not resume:
        what = Recipe.parse("", overrides)
    report = train(what, out, resume=resume)
    if report is None:
        typer.echo(f"coterie: interrupted; go on with: coterie train lm --resume --out {out}", err=True)
        raise typer.Exit(130)
    if json:
        typer.echo(report.to_json())
    else:
        print_trained(report, out)


@train_app.command("parts")
def train_parts() -> None:
    """List what a recipe can name, with every option and its default."""
    from coterie.recipe.recipe import parts

    for section, named in parts().items():
        for name, options in named.items():
            typer.echo(f"{section}{name and ': ' + name}")
            for option in options:
                typer.echo(f"    --{section}.{str(option).replace('_', '-', option.name.count('_'))}")


@app.command()
def compare(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes in YAML; the first sets the cost.")],
    equal: Annotated[
        str,
        typer.Option(
            help="active: parameters per token, by width. flops: of training, by steps. steps: as is."
        ),
    ] = "active",
    seeds: Annotated[int, typer.Option(help="How many trainings of each.")] = 1,
    text: Annotated[
        list[str] | None, typer.Option(help="Learn from this instead of the recipes' text.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results and report.")] = Path("coterie-compare"),
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Train several recipes on the same text at equal cost, and show them side by side."""
    from coterie.recipe import Recipe, compare_recipes
    from coterie.recipe.compare import print_comparison

    read = [Recipe.read(path, [("text", text)] if text else []) for path in recipes]
    with interruptible(RESUMES):
        result = compare_recipes(read, equal=equal, seeds=seeds, out=out)
    if json:
        typer.echo(result.to_json())
    else:
        print_comparison(result, out)


def _part_options(args: list[str]) -> tuple[list[str], list[tuple[str, object]]]:
    """What is no option, at most one; and `--section.option value`, `--section.option=value` as pairs."""
    import yaml

    others, found, rest = list[str](), list[tuple[str, object]](), list(args)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            others.append(flag)
            continue
        key, assigned, value = flag.removeprefix("--").partition("=")
        if "." not in key:
            raise ValueError(
                f"{flag!r} is no option; parts take theirs as --section.option, as in --router.p 0.4"
            )
        if not assigned:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"{flag} needs a value")
            value = rest.pop(0)
        found.append((key.replace("-", "_"), yaml.safe_load(value)))
    if len(others) > 1:
        raise ValueError(f"one recipe can be trained at a time; found {', '.join(others)}")
    return others, found
