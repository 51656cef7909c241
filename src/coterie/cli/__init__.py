"""The command line: parses, calls, prints. Heavy imports happen inside commands, so that help is quick."""

from coterie.cli.app import app, main

# isort: off  the order of the help
from coterie.cli import start  # noqa: F401
from coterie.cli import language_models  # noqa: F401
from coterie.cli import checkpoints  # noqa: F401

__all__ = ["app", "main"]
