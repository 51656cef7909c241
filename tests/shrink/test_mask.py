import json

import pytest

from coterie.hf import find_moe_blocks
from coterie.shrink import load_mask, save_mask

KEPT = [[0, 3, 4], [1, 2, 7]]


def test_a_mask_comes_back_as_it_was_written(model, tmp_path):
    blocks = find_moe_blocks(model)
    save_mask(tmp_path / "mask.json", blocks, KEPT)
    assert load_mask(tmp_path / "mask.json", blocks) == KEPT
    content = json.loads((tmp_path / "mask.json").read_text())
    assert content["layers"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert content["mask"][1] == [0, 1, 1, 0, 0, 0, 0, 1]


def test_a_bare_list_of_floats_is_read_in_the_order_of_the_blocks(model, tmp_path):
    rows = [[float(i in ids) for i in range(8)] for ids in KEPT]
    (tmp_path / "mask.json").write_text(json.dumps(rows))
    assert load_mask(tmp_path / "mask.json", find_moe_blocks(model)) == KEPT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[1] * 8], "holds 1 rows; a row of 0 and 1 for each of 2 blocks"),
        ([[1] * 8, [1] * 7], "model.layers.1.mlp needs 8 entries, each 0 or 1"),
        ([[1] * 8, [0.5] * 8], "each 0 or 1"),
        ({"layers": ["a", "b"], "mask": [[1] * 8] * 2}, "is for the layers"),
        ("mask", "holds str"),
    ],
)
def test_a_mask_of_another_model_is_refused(model, tmp_path, content, message):
    (tmp_path / "mask.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_mask(tmp_path / "mask.json", find_moe_blocks(model))


def test_what_is_no_mask_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_mask(tmp_path / "mask.json", [])
    (tmp_path / "mask.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_mask(tmp_path / "mask.json", [])
