import pytest
import toy

from coterie.reproduce.experiment import experiment_of


@pytest.fixture(autouse=True)
def _log(tmp_path, monkeypatch):
    monkeypatch.setenv("LOG", str(tmp_path / "log"))


@pytest.fixture
def paper():
    return experiment_of(toy)
