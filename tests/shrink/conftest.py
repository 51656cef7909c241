import json

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from coterie.data import byte_tokenizer


def tiny(**sizes):
    torch.manual_seed(0)
    options = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 16,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "initializer_range": 0.5,
        "max_position_embeddings": 64,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**options | sizes)).eval()


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
