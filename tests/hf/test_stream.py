"""Streamed, one layer in memory at a time, a checkpoint's records are those of the whole model."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from families import families, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from coterie.hf import Checkpoint, find_moe_blocks, load, recording, save, stream_layers, stream_records

FAMILIES = [
    ("mixtral", "MixtralExperts"),
    ("qwen3_moe", "Qwen3MoeExperts"),
    ("deepseek_v3", "DeepseekV3Experts"),
    ("olmoe", "OlmoeExperts"),
    ("gpt_oss", "GptOssExperts"),
    ("qwen2_moe", "Qwen2MoeExperts"),
    ("phimoe", "PhimoeExperts"),
]
EVERY = families()
GENERATOR = torch.Generator().manual_seed(0)
EIGHT = dict.fromkeys(("num_experts", "num_local_experts"), 8)
BATCHES = [torch.randint(3, 128, shape, generator=GENERATOR) for shape in ((2, 9), (1, 12))]
# As docs/families.md says. What `tiny_model` makes of all others is streamed.
REFUSED = {"inkling2_loop": r"calls model\.layers\.1 more than once"}
TALKER = "Qwen3OmniMoeTalkerTextExperts"  # reads another model's embeddings, no ids
SHARED = {"num_hidden_layers": 3, "layer_types": ["indexed_attention"] * 3, "mlp_layer_types": ["sparse"] * 3}
# What layers are handed besides the hidden states of the one below.
HANDED = {
    "streams, token ids": ("deepseek_v4", "DeepseekV4Experts", {}),
    "the choice of an indexer": (
        "glm_moe_dsa",
        "GlmMoeDsaExperts",
        SHARED | {"indexer_types": ["full", "shared", "full"], "index_topk": 4},
    ),
    "streams, the choice of an indexer": (
        "hy_v4",
        "HYV4Experts",
        SHARED | {"indexer_types": ["full", "shared", "shared"], "index_topk": 4},
    ),
    "keys and values": (
        "mistral_large4",
        "MistralLarge4TextExperts",
        SHARED
        | {
            "indexer_types": ["full", "full", "shared"],
            "index_topk": 4,
            "kv_source_layers": [0, 1, 1],
            "no_rope_layers": [1, 0, 0],
        },
    ),
    "streams, n-grams of token ids": (
        "qwen4_exp",
        "Qwen4ExpTextExperts",
        {
            "ple_layer_ids": [1],
            "ngram_vocab_size_base": 50,
            "heads_per_ngram": 2,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 1,
        },
    ),
    "the router's state": ("zaya", "ZayaExperts", {}),
    "outputs of all layers": ("inkling2", "Inkling2Experts", {}),
}
PARTS = ("weights", "norms", "moved", "inputs")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path):
    tiny_model("qwen3_moe", "Qwen3MoeExperts", **EIGHT).save_pretrained(tmp_path, max_shard_size="80KB")
    return tmp_path


@pytest.mark.parametrize(("family", "experts"), FAMILIES)
def test_streamed_records_are_those_of_the_whole_model(family, experts, tmp_path):
    # a sliding window shorter than the text, where there is one: layers then have masks of their own
    tiny_model(family, experts, sliding_window=4).save_pretrained(tmp_path, max_shard_size="80KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_streams(tmp_path, keep_inputs=15)


@pytest.mark.parametrize(("family", "experts", "sizes"), HANDED.values(), ids=HANDED)
def test_layers_may_be_handed_more_than_hidden_states(family, experts, sizes, tmp_path):
    tiny_model(family, experts, **sizes).save_pretrained(tmp_path)
    assert_streams(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "experts"), [pair for pair in EVERY if pair[1] != TALKER])
def test_every_family_is_streamed_or_refused(family, experts, tmp_path):
    tiny_model(family, experts).save_pretrained(tmp_path, max_shard_size="80KB")
    if family in REFUSED:
        refused(tmp_path, f"{REFUSED[family]}, so it cannot be streamed; load the whole model instead")
    else:
        assert_streams(tmp_path)


def test_the_docs_say_which_families_are_streamed():
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    section = page.partition("## Which are streamed")[2].partition("\n## ")[0]
    names = {family for family, _ in EVERY}
    assert f"{len(names) - len(REFUSED)} of the {len(names)} families" in section
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(REFUSED)


@torch.no_grad()
def reads(model, blocks, passes):
    """What each block reads in these passes, [T, D]."""
    seen = [[] for _ in blocks]
    hooks = [
        block.module.register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, 1))
        )
        for block, inputs in zip(blocks, seen, strict=True)
    ]
    for run in passes:
        run()
    for hook in hooks:
        hook.remove()
    return [torch.cat(inputs) for inputs in seen]


class Half(torch.nn.Module):
    """In the place of a bank: half of each token."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states / 2


@pytest.mark.parametrize("replace", [False, True])
def test_layers_see_what_the_edited_ones_below_give(folder, replace):
    model = load(folder)
    whole, runs = find_moe_blocks(model), [lambda ids=ids: model(ids) for ids in BATCHES]
    original = reads(model, whole, runs)
    if replace:
        model.model.layers[0].mlp.experts = Half()
    else:
        whole[0].experts.down.mul_(3)
    expected = reads(model, whole, runs)
    checkpoint = Checkpoint(folder)
    banks = [block.bank for block in checkpoint.blocks]
    found = []
    for block, passes in stream_layers(checkpoint, BATCHES):
        found += reads(checkpoint.model, [block], passes)
        if block is checkpoint.blocks[0]:
            if replace:
                checkpoint.model.model.layers[0].mlp.experts = Half()
            else:
                block.experts.down.mul_(3)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not torch.equal(found[1], original[1])
    assert [layer.mlp.experts for layer in checkpoint.model.model.layers] == banks
    assert all(t.is_meta for t in checkpoint.model.model.layers.parameters())


def test_layers_without_experts_are_passed_through(tmp_path):
    model = tiny_model("deepseek_v3", "DeepseekV3Experts", num_hidden_layers=4, first_k_dense_replace=2)
    model.save_pretrained(tmp_path)
    assert_streams(tmp_path)
    assert [block.name for block, _ in stream_records(tmp_path, BATCHES)] == [
        "model.layers.2.mlp",
        "model.layers.3.mlp",
    ]


def test_the_dtype_of_the_checkpoint_is_the_dtype_of_the_run(tmp_path):
    tiny_model("qwen3_moe", "Qwen3MoeExperts").bfloat16().save_pretrained(tmp_path)
    assert_streams(tmp_path)
    assert Checkpoint(tmp_path).model.dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Checkpoint(tmp_path).model.dtype == torch.bfloat16, "of the tensors, where it is not said"


def test_layers_of_different_sizes_are_streamed_as_well(folder, tmp_path):
    model = load(folder)
    first, second = find_moe_blocks(model)
    first.keep([0, 2, 5])
    second.set_top_k(1)
    save(model, tmp_path / "uneven", format="coterie")
    assert_streams(tmp_path / "uneven")


def test_an_edit_of_a_streamed_block_does_not_change_what_the_layers_above_record(folder):
    untouched = [record for _, record in stream_records(folder, BATCHES)]
    edited = []
    for block, record in stream_records(folder, BATCHES):
        edited.append(record)
        block.keep([1, 3, 6])
        assert block.experts.up.shape[0] == 3
    assert_equal(edited, untouched)


def test_only_the_layer_at_hand_is_in_memory(folder):
    checkpoint = Checkpoint(folder)
    loaded = []
    for _ in stream_records(checkpoint, BATCHES):
        state = checkpoint.model.state_dict()
        loaded.append({".".join(name.split(".")[:3]) for name, tensor in state.items() if not tensor.is_meta})
    assert loaded == [{"model.layers.0", "model.norm.weight"}, {"model.layers.1", "model.norm.weight"}]
    assert all(tensor.is_meta for tensor in checkpoint.model.state_dict().values())


def test_what_is_missing_is_named_in_one_line(folder):
    with pytest.raises(ValueError, match="there are no batches"):
        next(stream_records(folder, []))
    config = json.loads((folder / "config.json").read_text())
    more = config | {"num_hidden_layers": 3, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(more))
    refused(folder, r"lacks model\.layers\.2\.\S+, which config\.json asks for")
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    refused(folder, r"embed_tokens\.weight has shape \[128, 64\], config\.json asks \[128, 32\]")
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    refused(folder, "is quantised")


def test_a_dense_model_is_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    refused(tmp_path, "LlamaForCausalLM has no MoE block")


def test_a_shard_that_vanishes_or_is_cut_short_is_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shutil.copy(shard, folder / "whole")
    shard.write_bytes(shard.read_bytes()[:-8])
    refused(folder, f"{shard.name} is damaged")
    shard.unlink()
    refused(folder, f"{shard.name} is missing")


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        list(stream_records(folder, BATCHES))
    assert "\n" not in str(caught.value)


def assert_streams(folder, **options):
    model = load(folder)
    with recording(find_moe_blocks(model), **options) as whole, torch.no_grad():
        for ids_BS in BATCHES:
            model(input_ids=ids_BS)
    assert_equal([record for _, record in stream_records(folder, BATCHES, **options)], whole)


def assert_equal(streamed, whole):
    assert [record.name for record in streamed] == [record.name for record in whole]
    for one, other in zip(streamed, whole, strict=True):
        assert one.num_experts == other.num_experts
        assert torch.equal(one.experts, other.experts)
        for part in PARTS:  # weights lie elsewhere in memory: sums may be taken in another order
            torch.testing.assert_close(getattr(one, part), getattr(other, part), rtol=1e-5, atol=1e-6)
