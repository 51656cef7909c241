"""Commands that need nothing of the user's: quickstart, doctor, and the papers."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.app import RESUMES, app, echo_json, interruptible, lacks_extra


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

    Run it again after an interruption and it goes on arm by arm. With --all, a paper whose extra is not
    installed is left out. Exit status 1: a claim does not hold, or --all has left out a paper.
    """
    from coterie.reproduce.experiment import find_papers
    from coterie.reproduce.results import Result, print_result
    from coterie.reproduce.run import reproduce

    if (slug is None) != everything:
        raise ValueError("give one paper's slug, or --all; `coterie papers` lists them")
    if everything and (data or arms):
        raise ValueError("--data and --arms belong to one paper; give its slug instead of --all")
    chosen = arms.split(",") if arms else []
    results, left_out = list[Result](), dict[str, str]()
    for name in find_papers() if everything else [str(slug)]:
        try:
            with interruptible(RESUMES):
                result = reproduce(
                    name, budget=budget, seeds=seeds, first_seed=first_seed, data=data, arms=chosen, out=out
                )
        except ModuleNotFoundError as error:
            if not (everything and lacks_extra(error)):
                raise
            left_out[name] = str(error)
            typer.echo(f"coterie: {name} was not run: {error}\n", err=True)
            continue
        results.append(result)
        if not json:
            print_result(result)
            typer.echo(f"report      {out / name}.html\nresults     {out / name}.json\n")
    if json:
        summaries = [result.summary() for result in results]
        missing = [{"slug": name, "not run": reason} for name, reason in left_out.items()]
        echo_json([*summaries, *missing] if everything else summaries[0])
    if left_out:
        of = len(results) + len(left_out)
        typer.echo(f"coterie: {len(left_out)} of {of} papers were not run: {', '.join(left_out)}", err=True)
    if left_out or not all(result.holds for result in results):
        raise typer.Exit(1)
