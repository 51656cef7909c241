"""The command line: parses, calls, prints. Heavy imports happen inside commands, so that help is quick."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from coterie.shrink.result import Shrunk

app = typer.Typer(
    name="coterie",
    help="Mixtures of experts on one small core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    # OpenMP's idle threads spin for milliseconds by default; beside another busy program that slows training
    # manifold. Microseconds are enough to catch the next operation.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except ValueError as error:
        typer.echo(f"coterie: {error}", err=True)
        sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        from coterie import __version__

        typer.echo(f"coterie {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    text: Annotated[
        list[Path] | None,
        typer.Option(help="File or folder to learn from; repeat for more. Default: Python's own sources."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report and checkpoints.")] = Path(
        "coterie-quickstart"
    ),
    minutes: Annotated[float | None, typer.Option(help="Train both models in about this time.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps per model, instead of --minutes.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data split and data order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Train a dense and an MoE language model on real text; compare them; look inside the experts."""
    from coterie.quickstart import print_report, quickstart

    report = quickstart(text or [], out, minutes=minutes, steps=steps, seed=seed, resume=resume)
    if report is None:
        typer.echo(f"coterie: interrupted; go on with: coterie quickstart --resume --out {out}", err=True)
        raise typer.Exit(130)
    if json:
        typer.echo(report.to_json())
    else:
        print_report(report, out)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print as JSON and nothing else.")] = False,
) -> None:
    """Say what this installation can do: versions, threads, kernel backends, extras."""
    from coterie.doctor import examine, print_findings

    findings = examine()
    if json:
        import json as json_format

        typer.echo(json_format.dumps(findings, indent=1))
    else:
        print_findings(findings)
    if not findings["healthy"]:
        raise typer.Exit(1)


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
    try:
        result = compare_recipes(read, equal=equal, seeds=seeds, out=out)
    except KeyboardInterrupt:
        typer.echo("coterie: interrupted; the same command goes on with what is left", err=True)
        raise typer.Exit(130) from None
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


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint: config.json and safetensors.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file, folder, .jsonl, saved dataset, or ids as .pt or .safetensors; repeat to compare."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of each text, at most.")] = 4096,
    html: Annotated[Path | None, typer.Option(help="Write the routing explorer here, one page.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Say what each expert of a checkpoint does with some text; one layer is in memory at a time."""
    from coterie.inspect import inspect, print_inspection, show_progress, write_page

    try:
        with show_progress() as progress:
            found = inspect(model, text or [], tokens=tokens, progress=progress)
    except KeyboardInterrupt:
        typer.echo("coterie: interrupted; nothing was written", err=True)
        raise typer.Exit(130) from None
    if html:
        write_page(html, found, command="coterie " + " ".join(sys.argv[1:]))
    if json:
        typer.echo(found.to_json())
        return
    print_inspection(found)
    if html:
        typer.echo(f"\nexplorer    {html}")


@app.command()
def papers(
    query: Annotated[
        list[str] | None, typer.Argument(help="Words to look for, or one paper's slug for its card.")
    ] = None,
) -> None:
    """List the papers that can be re-run, or show one."""
    from coterie.reproduce.listing import print_papers

    print_papers(" ".join(query or []))


@app.command()
def reproduce(
    slug: Annotated[str | None, typer.Argument(help="The paper; see `coterie papers`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every paper, instead of SLUG.")] = False,
    budget: Annotated[
        str, typer.Option(help="smoke: seconds, for the code. standard: minutes, for the claims. full.")
    ] = "standard",
    seeds: Annotated[int | None, typer.Option(help="How many. Default: 1 for smoke, mostly 3.")] = None,
    first_seed: Annotated[int, typer.Option(help="The seeds go up from here.")] = 0,
    data: Annotated[Path | None, typer.Option(help="Your own file or folder, in the paper's format.")] = None,
    arms: Annotated[str | None, typer.Option(help="Only these, separated by commas.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results and reports.")] = Path("coterie-reproduce"),
) -> None:
    """Re-run a paper: its method beside its baselines, and a verdict on each of its claims.

    Run it again after an interruption and it goes on arm by arm. Exit status 1: a claim does not hold.
    """
    import json as json_format

    from coterie.reproduce.experiment import find_papers
    from coterie.reproduce.results import print_result
    from coterie.reproduce.run import reproduce

    if (slug is None) != everything:
        raise ValueError("give one paper's slug, or --all; `coterie papers` lists them")
    if everything and (data or arms):
        raise ValueError("--data and --arms belong to one paper; give its slug instead of --all")
    chosen = arms.split(",") if arms else []
    results = []
    for name in find_papers() if everything else [str(slug)]:
        try:
            result = reproduce(
                name, budget=budget, seeds=seeds, first_seed=first_seed, data=data, arms=chosen, out=out
            )
        except KeyboardInterrupt:
            typer.echo("coterie: interrupted; the same command goes on with what is left", err=True)
            raise typer.Exit(130) from None
        results.append(result)
        if not json:
            print_result(result)
            typer.echo(f"report      {out / name}.html\nresults     {out / name}.json\n")
    if json:
        summaries = [result.summary() for result in results]
        typer.echo(json_format.dumps(summaries if everything else summaries[0], ensure_ascii=False, indent=1))
    if not all(result.holds for result in results):
        raise typer.Exit(1)


_Calib = Annotated[
    list[Path],
    typer.Option(help="Text or .jsonl of a domain; repeat for more domains. Its last tenth is held out."),
]
_Out = Annotated[Path | None, typer.Option(help="A new folder; not needed with --dry-run.")]
_Format = Annotated[
    str, typer.Option(help="transformers: loads without coterie. coterie: layers may differ, too.")
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be kept; write nothing.")]
_Report = Annotated[
    bool, typer.Option("--report", help="Write OUT/report.html, too, unless it is a dry run.")
]
_Tokens = Annotated[int, typer.Option(help="Calibrate on this many tokens of each domain at most.")]
_SeqLen = Annotated[int, typer.Option(help="Tokens of a sequence at most.")]
_Stream = Annotated[
    bool,
    typer.Option("--stream", help="One layer in memory at a time; measures no perplexity and no speed."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")]


@app.command()
def prune(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, with its tokenizer.")],
    calib: _Calib,
    keep: Annotated[int, typer.Option(help="Experts to keep in each layer.")],
    method: Annotated[
        str,
        typer.Option(
            help="easy-ep, reap, frequency, gating, gating-norm, gating-token, random; or output-error, "
            "which tries all choices where they are few."
        ),
    ] = "easy-ep",
    out: _Out = None,
    report: _Report = False,
    dry_run: _DryRun = False,
    format: _Format = "transformers",
    tokens: _Tokens = 65536,
    seq_len: _SeqLen = 512,
    seed: Annotated[int, typer.Option(help="Of the method random.")] = 0,
    stream: _Stream = False,
    json: _Json = False,
) -> None:
    """Keep the experts that some text needs and delete the others; compare before and after.

    Run it again after an interruption and it goes on with the calibration that was done.
    """
    from coterie.shrink.checkpoint import prune_checkpoint

    _shrink(
        lambda: prune_checkpoint(
            model,
            out,
            keep=keep,
            calib=calib,
            method=method,
            format=format,
            dry_run=dry_run,
            max_tokens=tokens,
            seq_len=seq_len,
            stream=stream,
            seed=seed,
        ),
        report and not dry_run,
        json,
    )


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, with its tokenizer.")],
    calib: _Calib,
    groups: Annotated[int, typer.Option(help="Experts that are left in each layer.")],
    method: Annotated[
        str,
        typer.Option(help="m-smoe, whole experts; or dern, neuron by neuron into the experts that are left."),
    ] = "m-smoe",
    threshold: Annotated[
        float, typer.Option(help="Of dern: the cosine above which a neuron counts as similar, -1 to 1.")
    ] = 0.6,
    out: _Out = None,
    report: _Report = False,
    dry_run: _DryRun = False,
    format: _Format = "transformers",
    tokens: _Tokens = 65536,
    seq_len: _SeqLen = 512,
    stream: _Stream = False,
    json: _Json = False,
) -> None:
    """Merge experts that are alike, group by group; compare before and after."""
    from coterie.shrink.checkpoint import merge_checkpoint

    _shrink(
        lambda: merge_checkpoint(
            model,
            out,
            groups=groups,
            calib=calib,
            method=method,
            threshold=threshold,
            format=format,
            dry_run=dry_run,
            max_tokens=tokens,
            seq_len=seq_len,
            stream=stream,
        ),
        report and not dry_run,
        json,
    )


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, with its tokenizer.")],
    calib: _Calib,
    bits: Annotated[
        float, typer.Option(help="Per expert, on average for mc-sharp (2.05); else 1, 2, 3, 4 or 8.")
    ],
    method: Annotated[
        str,
        typer.Option(help="mc-sharp: 1, 2 or 3 bits, whatever each expert needs. gptq, rtn: all the same."),
    ] = "mc-sharp",
    out: _Out = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print which bits would be chosen; write nothing.")
    ] = False,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale; -1 for whole rows.")] = 128,
    tokens: _Tokens = 65536,
    seq_len: _SeqLen = 512,
    json: _Json = False,
) -> None:
    """Store the experts in few bits, each in what it needs; compare bytes and perplexity before and after.

    The new folder is read by coterie.shrink.load_packed. Interrupted, nothing is written.
    """
    from coterie.report.quantized import print_quantized
    from coterie.shrink.quantize_checkpoint import quantize_checkpoint

    try:
        quantized = quantize_checkpoint(
            model,
            out,
            bits=bits,
            calib=calib,
            method=method,
            group_size=group_size,
            dry_run=dry_run,
            max_tokens=tokens,
            seq_len=seq_len,
        )
    except KeyboardInterrupt:
        typer.echo("coterie: interrupted; nothing was written", err=True)
        raise typer.Exit(130) from None
    if json:
        import json as json_format

        typer.echo(json_format.dumps(quantized.to_dict(), ensure_ascii=False, indent=1))
    else:
        print_quantized(quantized)


def _shrink(run: Callable[[], "Shrunk"], report: bool, json: bool) -> None:
    from coterie.report.shrunk import print_shrunk, write_shrunk_page

    try:
        shrunk = run()
    except KeyboardInterrupt:
        typer.echo("coterie: interrupted; the same command goes on with what is left", err=True)
        raise typer.Exit(130) from None
    if report:
        write_shrunk_page(Path(str(shrunk.out)) / "report.html", shrunk)
    if json:
        import json as json_format

        typer.echo(json_format.dumps(shrunk.to_dict(), ensure_ascii=False, indent=1))
    else:
        print_shrunk(shrunk)
