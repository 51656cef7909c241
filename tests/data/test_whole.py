import pytest

from coterie.data import written_whole


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
