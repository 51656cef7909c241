"""The editable view, in every transformers family that has the experts interface."""

import copy
from contextlib import ExitStack

import pytest
import torch
from families import families, output, tiny_model
from torch.overrides import TorchFunctionMode

from coterie.hf import find_moe_blocks, save
from coterie.hf.modules import get_tensor

E, K = 8, 2
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SIZES = dict.fromkeys(COUNTS, E) | {"n_group": 2, "topk_group": 1, "num_expert_group": 2}
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
DROPPED = [2, 6]  # one of each group
KEPT = [i for i in range(E) if i not in DROPPED]
ORDER = [5, 7, 4, 6, 1, 0, 3, 2]  # the groups change places

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
    return type(model).from_pretrained(folder, experts_implementation="eager")


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
