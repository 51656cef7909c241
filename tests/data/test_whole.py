import os

import pytest
from safetensors import SafetensorError

from coterie.data import check_writable, written_whole


def test_a_file_is_replaced_only_when_the_block_ends_well(tmp_path):
    file = tmp_path / "deep" / "table.csv"
    with written_whole(file) as draft:
        draft.write_text("first")
        assert draft.suffix == ".csv"
        assert not file.exists()
    with pytest.raises(KeyboardInterrupt), written_whole(file) as draft:  # noqa: PT012
        draft.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "first"
    assert [path.name for path in file.parent.iterdir()] == ["table.csv"]


def test_a_folder_takes_the_place_of_an_empty_one_and_of_no_other(tmp_path):
    (tmp_path / "empty").mkdir()
    with written_whole(tmp_path / "empty") as draft:
        draft.mkdir()
        (draft / "a").write_text("a")
    assert (tmp_path / "empty" / "a").read_text() == "a"
    with pytest.raises(OSError, match="not empty"), written_whole(tmp_path / "empty") as draft:
        draft.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["empty", "a"]


def test_a_disk_that_safetensors_finds_full_is_an_oserror_that_names_the_target(tmp_path):
    with pytest.raises(OSError, match="cannot write model: No space left"):  # noqa: SIM117
        with written_whole(tmp_path / "model"):
            raise SafetensorError("No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"deep/model cannot be written: .*file is a file"):
        check_writable(tmp_path / "file" / "deep" / "model")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # a superuser may write anywhere
    with pytest.raises(ValueError, match=f"{tmp_path} is read-only"):
        check_writable(tmp_path / "new" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
