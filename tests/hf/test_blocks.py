"""The editable view, in every transformers family that has the experts interface."""

import copy
import importlib
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from families import TINY, families, output, table_row, tiny_config, tiny_model
from torch.overrides import TorchFunctionMode

from coterie.hf import find_moe_blocks, save
from coterie.hf.modules import get_tensor

E, K = 8, 2
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
GROUPS = {"n_group": 2, "num_expert_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}
SIZES = dict.fromkeys(COUNTS, E) | GROUPS
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
DROPPED = [2, 6]  # one of each group
KEPT = [i for i in range(E) if i not in DROPPED]
ORDER = [5, 7, 4, 6, 1, 0, 3, 2]  # the groups change places

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=families(), ids=lambda family: family[1])
def original(request):
    model = tiny_model(*request.param, **SIZES)
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in find_moe_blocks(model):  # so large that a wrong expert shows in the logits
            for role, name in (block.layout.experts | block.layout.router).items():
                tensor = get_tensor(model, name)
                if role == "hash_table":
                    kept = torch.tensor(KEPT)
                    tensor.copy_(kept[torch.randint(len(kept), tensor.shape, generator=generator)])
                else:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + (role == "scale"))
    return model


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


def reloaded(model, folder):
    save(model, folder)
    # copied, because tensors inside a mapped file are aligned otherwise, and sums are then split otherwise
    return copy.deepcopy(type(model).from_pretrained(folder, experts_implementation="eager"))


def assert_close(a, b):
    """Equal up to the order in which float32 numbers are added: a relative error of 1e-5 in norm."""
    assert float((a - b).norm() / b.norm()) < 1e-5


def test_saved_unedited_it_gives_identical_logits(model, tmp_path):
    assert torch.equal(output(reloaded(model, tmp_path / "saved"), IDS), output(model, IDS))


def test_without_experts_that_are_never_chosen_it_gives_the_same_logits(model, tmp_path):
    with NeverChosen(model, DROPPED):
        output(model, IDS)
    before = output(model, IDS)
    blocks = find_moe_blocks(model)
    assert blocks
    for block in blocks:
        block.keep(KEPT)
    assert_close(output(model, IDS), before)
    saved = reloaded(model, tmp_path / "saved")
    assert [block.num_experts for block in find_moe_blocks(saved)] == [len(KEPT)] * len(blocks)
    assert_close(output(saved, IDS), before)


def test_after_a_trial_it_is_what_it_was(model):
    before, numbers = output(model, IDS), [block.layout for block in find_moe_blocks(model)]
    blocks = find_moe_blocks(model)
    with ExitStack() as trials:
        for block in blocks:
            trials.enter_context(block.trial())
            block.keep(KEPT)
        assert [block.num_experts for block in find_moe_blocks(model)] == [len(KEPT)] * len(blocks)
    assert [block.layout for block in blocks] == numbers
    assert [block.layout for block in find_moe_blocks(model)] == numbers
    assert torch.equal(output(model, IDS), before)


def test_renumbering_its_experts_gives_the_same_logits(model):
    before = output(model, IDS)
    for block in find_moe_blocks(model):
        first = block.experts[[ORDER[0]]]
        block.permute(ORDER)
        torch.testing.assert_close(vars(block.experts[[0]]), vars(first), rtol=0, atol=0)
    assert_close(output(model, IDS), before)


def test_no_tensor_with_an_entry_per_expert_is_overlooked(model):
    for block in find_moe_blocks(model):
        known = {*block.layout.experts.values(), *block.layout.router.values()}
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        inside = {n: t for n, t in tensors.items() if n.startswith(f"{block.name}.") and "attn" not in n}
        assert [n for n, t in inside.items() if E in t.shape and n not in known] == []


def test_it_is_in_the_table_of_families(original, request):
    family = request.node.callspec.params["original"][0]
    rows = {table_row(family, block) for block in find_moe_blocks(original)}
    listed = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {family} |")]
    assert rows <= set(listed), f"docs/families.md lacks {sorted(rows - set(listed))}"


def test_the_table_of_families_lists_no_other_and_counts_them_right():
    names = {family for family, _ in families()}
    text = PAGE.read_text()
    table = text[text.index("| family | experts, top-k |") :].split("\n\n")[0].splitlines()[2:]
    assert {line.split("|")[1].strip() for line in table} == names
    assert f"all {len(names)} families" in text


class NeverChosen(TorchFunctionMode):
    """While the model runs, changes its routers so that none of its tokens is sent to `experts`."""

    def __init__(self, model, experts):
        super().__init__()
        self.experts = experts
        self.rows = {}
        for block in find_moe_blocks(model):
            router = block.router
            self.rows[router.rows.data_ptr()] = router.rows
            if router.selection_bias is not None:
                router.selection_bias[experts] = -50

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear and args[1].data_ptr() in self.rows:
            x_TD = args[0].flatten(0, -2).double()
            very_negative = torch.full((len(x_TD), 1), -1000.0, dtype=torch.float64)
            row_D = torch.linalg.lstsq(x_TD, very_negative, driver="gelsd").solution[:, 0]
            self.rows[args[1].data_ptr()][self.experts] = row_D.float()
        return function(*args, **(kwargs or {}))


def test_experts_that_two_stacks_share_are_edited_once_and_stay_shared():
    module = importlib.import_module("transformers.models.diffusion_gemma.modeling_diffusion_gemma")
    model = module.DiffusionGemmaModel(tiny_config(module.DiffusionGemmaConfig, TINY | SIZES))
    blocks = find_moe_blocks(model)
    assert len(blocks) == len(model.decoder.layers)
    for block in blocks:
        block.keep(KEPT)
    for encoder, decoder in zip(model.encoder.language_model.layers, model.decoder.layers, strict=True):
        assert encoder.experts.down_proj is decoder.experts.down_proj
        assert encoder.router.per_expert_scale is decoder.router.per_expert_scale
        assert encoder.experts.num_experts == decoder.experts.num_experts == len(KEPT)
    assert model.config.text_config.num_experts == len(KEPT)


def test_a_block_whose_numbers_are_not_in_a_saved_configuration_can_only_be_permuted():
    module = importlib.import_module("transformers.models.dots3_note.modeling_dots3_note")
    config = module.Dots3NoteVisionConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        moe_intermediate_size=16,
        pyramid_num_routed=[4, 6],  # experts in each layer
        adapter_in_dim=32,
        adapter_out_dim=32,
    )
    blocks = find_moe_blocks(module.Dots3NoteVisionModel(config))
    assert [block.num_experts for block in blocks] == [4, 6]
    with pytest.raises(ValueError, match="configuration made for its layer alone"):
        blocks[0].keep([0, 1, 2])
    before = blocks[0].experts.up[2].clone()
    blocks[0].permute([2, 0, 1, 3])
    assert torch.equal(blocks[0].experts.up[0], before)


def test_dropping_experts_that_are_chosen_changes_the_logits():
    model = tiny_model("qwen3_moe", "Qwen3MoeExperts", **SIZES)
    before = output(model, IDS)
    for block in find_moe_blocks(model):
        block.experts.up.mul_(10)
    assert float((output(model, IDS) - before).norm() / before.norm()) > 1e-2, "the view must write through"
    before = output(model, IDS)
    for block in find_moe_blocks(model):
        block.keep(KEPT)
    assert float((output(model, IDS) - before).norm() / before.norm()) > 1e-2
