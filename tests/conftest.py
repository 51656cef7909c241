import os
import signal
import sys
from pathlib import Path

# before torch: its idle threads would spin, see coterie.cli
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch
from hypothesis import settings

from coterie import cli

# a shell in the background ignores Ctrl-C, and the commands that tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("coterie", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("coterie")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data for tests that need it; they skip where it is absent."""
    folder = Path(os.environ.get("COTERIE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set COTERIE_DATA")
    return folder


@pytest.fixture
def coterie(monkeypatch, capsys):
    """Runs a command line in this process: (status, out, err)."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["coterie", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return command
