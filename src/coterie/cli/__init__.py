"""The command line: parses, calls, prints. Heavy imports happen inside commands, so that help is quick."""

# In the order of the help:
# isort: off
from coterie.cli.app import app, main
from coterie.cli import start  # noqa: F401
from coterie.cli import language_models  # noqa: F401
from coterie.cli import checkpoints  # noqa: F401
from coterie.cli import top_any  # noqa: F401
from coterie.cli import unlearn  # noqa: F401
from coterie.cli import estimators  # noqa: F401

# isort: on

__all__ = ["app", "main"]
