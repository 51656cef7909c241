"""The application, and how it ends: exit codes and one-line errors."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="coterie",
    help="Mixtures of experts on one small core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line.

    Exit codes: 0 done; 1 a check failed, or was left out for want of an extra; 2 bad input; 130 interrupted.
    """
    # OpenMP's idle threads spin for milliseconds by default; beside another busy program that slows training
    # manifold. Microseconds are enough to catch the next operation.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app([_home(argument) for argument in sys.argv[1:]])
    except ValueError as error:
        typer.echo(f"coterie: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # no space, no permission, no such file
        file = error.filename2 or error.filename
        what = f"{file}: {error.strerror}" if file and error.strerror else error
        typer.echo(f"coterie: {what}", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if not lacks_extra(error):
            raise
        typer.echo(f"coterie: {error}", err=True)
        sys.exit(2)


def _home(argument: str) -> str:
    """`~/` in --option=~/file, which shells leave as it is, and in quotes."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{os.path.expanduser(value) if value.startswith('~/') else value}"


def lacks_extra(error: ModuleNotFoundError) -> bool:
    """Whether one of our extras is not installed; any other missing module is a fault of ours."""
    return "pip install 'coterie[" in str(error)


LOST = "nothing was written"
RESUMES = "the same command goes on with what is left"


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Ctrl-C inside ends the command with exit code 130 and one line, which says what is left."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"coterie: interrupted; {advice}", err=True)
        raise typer.Exit(130) from None


def echo_json(value: Any) -> None:
    """Prints a value as JSON, for `--json`."""
    import json

    typer.echo(json.dumps(value, ensure_ascii=False, indent=1))


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
