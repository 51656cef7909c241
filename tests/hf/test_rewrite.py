"""A checkpoint pruned layer by layer on disk is the one that is pruned in memory; failures leave nothing."""

import json
import subprocess
import sys

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coterie.hf import Checkpoint, find_moe_blocks, load, rewriting, save, save_pruned, stream_records

FAMILIES = [
    ("mixtral", "MixtralExperts"),
    ("qwen3_moe", "Qwen3MoeExperts"),
    ("deepseek_v3", "DeepseekV3Experts"),
    ("olmoe", "OlmoeExperts"),
    ("gpt_oss", "GptOssExperts"),
]
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
EIGHT = dict.fromkeys(COUNTS, 8)
KEPT = [[0, 1, 4, 5, 7], [1, 2, 3, 5, 6]]
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def folder(tmp_path):
    model = tiny_model("qwen3_moe", "Qwen3MoeExperts", **EIGHT)
    model.save_pretrained(tmp_path / "in", max_shard_size="80KB")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "pytorch_model.bin").write_text("stale")
    return tmp_path / "in"


@pytest.mark.parametrize(("family", "experts"), FAMILIES)
def test_pruned_on_disk_it_is_the_model_pruned_in_memory(family, experts, tmp_path):
    model = tiny_model(family, experts, **EIGHT)
    model.save_pretrained(tmp_path / "in", max_shard_size="80KB")
    for block, ids in zip(find_moe_blocks(model), KEPT, strict=True):
        block.keep(ids)
    save(model, tmp_path / "memory")

    save_pruned(tmp_path / "in", KEPT, tmp_path / "out")

    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-5, atol=1e-6)
    tensors = {
        name: t for path in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(path).items()
    }
    wanted = load_file(tmp_path / "memory" / "model.safetensors")
    assert tensors.keys() == wanted.keys(), "the names on disk are those of the family"
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    configs = [json.loads((tmp_path / which / "config.json").read_text()) for which in ("out", "memory")]
    assert configs[0] == configs[1]


def test_what_belongs_to_the_model_comes_along_and_stale_weights_do_not(folder, tmp_path):
    save_pruned(folder, KEPT, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        *(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)),
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_layers_are_recorded_edited_and_written_one_at_a_time(folder, tmp_path):
    checkpoint = Checkpoint(folder)
    with rewriting(checkpoint, tmp_path / "out") as writer:
        for (block, record), ids in zip(stream_records(checkpoint, [IDS]), KEPT, strict=True):
            assert record.experts.shape == (18, 2)
            block.keep(ids)
            writer.write(block)
            with pytest.raises(ValueError, match="written already"):
                writer.write(block)
    save_pruned(folder, KEPT, tmp_path / "wanted")
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(tmp_path / "wanted")))


def test_what_is_not_edited_is_copied(folder, tmp_path):
    with rewriting(Checkpoint(folder), tmp_path / "out"):
        pass
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(folder)))


def test_layers_that_differ_need_the_format_of_coterie(folder, tmp_path):
    kept = [[0, 1, 2], [3, 4, 5, 6]]
    refused(folder, kept, tmp_path / "out", r"num_experts=3 and .* has 4.*format=\"coterie\"")
    save_pruned(folder, kept, tmp_path / "out", format="coterie")
    model = load(folder)
    for block, ids in zip(find_moe_blocks(model), kept, strict=True):
        block.keep(ids)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_impossible_edits_are_refused_before_anything_is_written(folder, tmp_path):
    refused(folder, [[0, 1]], tmp_path / "out", "has 2 MoE blocks, but kept has 1 lists")
    refused(folder, [[0], [0]], tmp_path / "out", "top_k=2 experts, so 1 are too few")
    refused(folder, [[0, 8], [0, 1]], tmp_path / "out", "has experts 0 … 7, not 8")
    refused(folder, KEPT, folder, "is the folder the model came from")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        save_pruned(folder, KEPT, tmp_path / "out")
    assert (tmp_path / "out" / "notes").read_text() == "mine"


def test_a_missing_or_damaged_shard_is_named(folder, tmp_path):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    refused(folder, KEPT, tmp_path / "out", f"{shard.name} is damaged")
    shard.unlink()
    refused(folder, KEPT, tmp_path / "out", f"{shard.name} is missing")


LIMITED = """
import resource, signal, sys
from coterie.hf import save_pruned
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    save_pruned(sys.argv[1], [[0, 1, 4, 5, 7], [1, 2, 3, 5, 6]], sys.argv[2])
except ValueError as error:
    print(error)
"""


def test_when_no_more_can_be_written_half_way_nothing_stays(tmp_path):
    # the layers fit below the limit, the larger embeddings, which come after them, do not
    tiny_model("qwen3_moe", "Qwen3MoeExperts", **EIGHT, vocab_size=8000).save_pretrained(tmp_path / "in")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, tmp_path / "in", tmp_path / "out", "1000000"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("cannot write out: "), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def refused(folder, kept, out, message):
    with pytest.raises(ValueError, match=message) as caught:
        save_pruned(folder, kept, out)
    assert "\n" not in str(caught.value)
    assert folder == out or not out.exists()
