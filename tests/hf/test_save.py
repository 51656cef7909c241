"""What is written loads with plain transformers, or with coterie where layers differ; the rest is refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from coterie.hf import Checkpoint, check_expressible, find_moe_blocks, load, outline, save

IDS = torch.arange(3, 17).view(2, 7)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.5,
    )
    return Qwen3MoeForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.arange(3, 17).view(2, 7)).logits
assert not [name for name in sys.modules if name.startswith("coterie")]
print(json.dumps([model.config.num_experts, logits.flatten().tolist()]))
"""


def test_an_edited_model_loads_with_plain_transformers(model, tmp_path):
    for block in find_moe_blocks(model):
        block.keep([0, 1, 4, 5, 7])
    save(model, tmp_path / "five")
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "five")], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    experts, values = json.loads(run.stdout.splitlines()[-1])
    assert experts == 5
    torch.testing.assert_close(torch.tensor(values), logits(model).flatten(), rtol=1e-5, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["five"], "nothing else may be left behind"


@pytest.fixture
def uneven(model):
    first, second = find_moe_blocks(model)
    first.keep([1, 2, 6])
    second.keep([0, 1, 2, 5, 7])
    second.set_top_k(3)
    return model


def test_layers_that_differ_are_refused_for_transformers_before_anything_is_written(uneven, tmp_path):
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp has num_experts=3 and .* has 5.*format=\"coterie\""
    ):
        save(uneven, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_can_be_asked_about_before_the_work_begins(model):
    blocks = find_moe_blocks(model)
    check_expressible(blocks, [4, 4])
    with pytest.raises(ValueError, match="has num_experts=4 and"):
        check_expressible(blocks, [4, 6])


def test_layers_that_differ_are_loaded_by_coterie(uneven, tmp_path):
    save(uneven, tmp_path / "out", format="coterie")
    loaded = load(tmp_path / "out")
    assert type(loaded) is Qwen3MoeForCausalLM
    assert [(b.num_experts, b.top_k) for b in find_moe_blocks(loaded)] == [(3, 2), (5, 3)]
    assert torch.equal(logits(loaded), logits(uneven))
    save(loaded, tmp_path / "again", format="coterie")
    assert torch.equal(logits(load(tmp_path / "again")), logits(uneven))


def test_plain_transformers_does_not_load_it_silently(uneven, tmp_path):
    save(uneven, tmp_path / "out", format="coterie")
    with pytest.raises(RuntimeError, match="mismatch"):
        Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out")


def test_load_also_reads_what_transformers_wrote(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_input_and_an_occupied_folder_are_refused(model, tmp_path):
    save(model, tmp_path / "in")
    loaded = load(tmp_path / "in")
    with pytest.raises(ValueError, match="is the folder the model came from"):
        save(loaded, tmp_path / "in")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        save(loaded, tmp_path / "taken")
    assert (tmp_path / "taken" / "notes").read_text() == "mine"


def test_an_interrupted_save_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupted(folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_is_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ValueError, match="has no MoE block"):
        save(LlamaForCausalLM(config), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_damaged_file_is_one_line_that_names_it(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    refused(tmp_path, f"{shards[1].name} is damaged")
    shards[1].write_bytes(b"\xff" * 64)
    refused(tmp_path, f"{shards[1].name} is damaged")
    shards[1].unlink()
    refused(tmp_path, f"{shards[1].name} is missing; model.safetensors.index.json lists it")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    refused(tmp_path, "model.safetensors.index.json is damaged")
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    refused(tmp_path, 'model.safetensors.index.json is damaged: it has no "weight_map"')
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json is damaged")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "has no config.json")
    refused(tmp_path / "Qwen" / "Qwen3-30B-A3B", "does not exist.*of the Hub.*hf download")


def test_weights_in_other_formats_are_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "has no safetensors files; pytorch_model.bin is not read")
    (tmp_path / "config.json").unlink()
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "q4.gguf")
    refused(tmp_path, "has no config.json.*; q4.gguf is not read")


def test_tensors_of_another_shape_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    change_config(tmp_path, num_local_experts=6)
    refused(tmp_path, r"mlp\.\S+ has shape \[8, .*config.json asks \[6, ")


def test_a_configuration_that_transformers_cannot_read_is_one_line(model, tmp_path):
    model.save_pretrained(tmp_path)
    change_config(tmp_path, num_experts_per_tok="two")
    refused(tmp_path, "config.json: .*num_experts_per_tok.*expected int, got str")
    change_config(tmp_path, num_experts_per_tok=2, model_type="alien")
    refused(tmp_path, "model type `alien`")


@pytest.mark.parametrize("read", [outline, Checkpoint])
def test_what_cannot_be_edited_is_refused_before_weights_are_read(model, tmp_path, read):
    model.save_pretrained(tmp_path)
    (tmp_path / "coterie-packed.json").write_text("{}")
    with pytest.raises(ValueError, match=r"are packed, and cannot be edited"):
        read(tmp_path)
    (tmp_path / "coterie-packed.json").unlink()
    change_config(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="is quantised; save it dequantised first"):
        read(tmp_path)


def test_an_outline_has_the_type_of_the_numbers_on_disk(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert outline(tmp_path).dtype == torch.bfloat16
    change_config(tmp_path, dtype=None)
    assert outline(tmp_path).dtype == torch.bfloat16


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_class_that_transformers_lacks_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["os"]}))
    refused(tmp_path, "names the class os")


def test_a_tensor_that_is_in_no_file_is_refused_instead_of_left_random(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, "lacks 1 of the model's tensors, such as model.norm.weight")


def test_an_unknown_format_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="use one of transformers, coterie"):
        save(model, tmp_path / "out", format="onnx")


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
