"""The command line: parses, calls, prints. Heavy imports happen inside commands, so that help is quick."""

# isort: off  the order of the help
from coterie.cli import (
    checkpoints,  # noqa: F401
    language_models,  # noqa: F401
    start,  # noqa: F401
)
from coterie.cli.app import app, main

__all__ = ["app", "main"]
