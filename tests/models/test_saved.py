import json

import pytest
import torch

from coterie.models import load_estimator, new_folder, save_estimator


def saved(folder):
    return save_estimator(
        folder, "Mean", parameters={"k": 2}, learnt={"a": [1]}, tensors={"m": torch.arange(3.0)}
    )


def test_parameters_learnt_things_and_tensors_come_back(tmp_path):
    parameters, learnt, tensors = load_estimator(saved(tmp_path / "m"), "Mean")
    assert (parameters, learnt) == ({"k": 2}, {"a": [1]})
    assert torch.equal(tensors["m"], torch.arange(3.0))


def test_shared_and_strided_tensors_are_written(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    save_estimator(tmp_path / "m", "X", parameters={}, learnt={}, tensors={"a": base.t(), "b": base})
    tensors = load_estimator(tmp_path / "m", "X")[2]
    assert torch.equal(tensors["a"], base.t())
    assert torch.equal(tensors["b"], base)


def test_a_failure_leaves_the_earlier_result_and_nothing_else(tmp_path):
    saved(tmp_path / "m")
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "m", "estimator.json") as draft:
        (draft / "missing folder" / "half").write_text("written")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "estimator.json",
        "weights.safetensors",
    ]


def test_what_json_cannot_hold_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(TypeError):
        save_estimator(tmp_path / "m", "X", parameters={"f": print}, learnt={}, tensors={})
    assert not list(tmp_path.iterdir())


def test_foreign_folders_and_damaged_files_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        saved(tmp_path / "full")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        saved(tmp_path / "file")
    with pytest.raises(ValueError, match=r"no estimator.json"):
        load_estimator(tmp_path / "full", "Mean")
    folder = saved(tmp_path / "m")
    with pytest.raises(ValueError, match="holds a Mean; Median cannot read it"):
        load_estimator(folder, "Median")
    described = json.loads((folder / "estimator.json").read_text())
    (folder / "estimator.json").write_text(json.dumps(described | {"version": 99}))
    with pytest.raises(ValueError, match="upgrade coterie"):
        load_estimator(folder, "Mean")
    (folder / "estimator.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_estimator(folder, "Mean")
    saved(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks weights.safetensors"):
        load_estimator(folder, "Mean")
