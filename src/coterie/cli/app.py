"""The application, and how it ends: exit codes and one-line errors."""

import os
import sys
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
