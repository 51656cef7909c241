"""The command line: parses, calls, prints. Heavy imports happen inside commands, so that help is quick."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="coterie",
    help="Mixtures of experts on one small core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
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
