import pytest
import torch
from tiny_moe import memorised, tiny_moe, two_texts

from coterie.data import byte_tokenizer


@pytest.fixture
def model():
    """Random weights."""
    return tiny_moe()


@pytest.fixture(scope="session")
def _taught():
    return memorised().state_dict()


@pytest.fixture
def taught(_taught):
    """A model that knows both of `two_texts` by heart."""
    model = tiny_moe()
    model.load_state_dict(_taught)
    return model


@pytest.fixture(scope="session")
def _checkpoint(tmp_path_factory, _taught):
    folder = tmp_path_factory.mktemp("models") / "taught"
    model = tiny_moe()
    model.load_state_dict(_taught)
    model.save_pretrained(folder)
    byte_tokenizer(64).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(_checkpoint):
    """The folder of `taught` with a byte tokenizer, which no test may change."""
    before = {file.name: file.read_bytes() for file in _checkpoint.iterdir()}
    yield _checkpoint
    assert {file.name: file.read_bytes() for file in _checkpoint.iterdir()} == before


@pytest.fixture
def texts(tmp_path):
    """`two_texts` as files: ids to forget and ids to keep."""
    paths = tmp_path / "forget.pt", tmp_path / "retain.pt"
    for path, ids in zip(paths, two_texts(), strict=True):
        torch.save(ids, path)
    return paths
