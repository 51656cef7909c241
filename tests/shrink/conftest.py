import json

import pytest
from tiny_models import tiny

from coterie.data import byte_tokenizer


@pytest.fixture
def model():
    return tiny()


@pytest.fixture(scope="session")
def _checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny().save_pretrained(folder)
    byte_tokenizer(64).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(_checkpoint):
    """A folder with a tiny Qwen3-MoE and a byte tokenizer, which no test may change."""
    before = {file.name: file.read_bytes() for file in _checkpoint.iterdir()}
    yield _checkpoint
    assert {file.name: file.read_bytes() for file in _checkpoint.iterdir()} == before


@pytest.fixture
def texts(tmp_path):
    """Two calibration files: prose as .txt, sums as .jsonl."""
    prose, sums = tmp_path / "prose.txt", tmp_path / "sums.jsonl"
    prose.write_text("A router sends each token to a few experts. " * 20)
    lines = [{"input": f"{i} + {i} = ", "output": f"{2 * i}; so it goes on and on"} for i in range(20)]
    sums.write_text("\n".join(map(json.dumps, lines)))
    return prose, sums
