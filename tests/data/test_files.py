import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.data import Span, find_text, split_by_file, stdlib_sources


def write(folder: Path, sizes: dict[str, int]) -> list[Path]:
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    return [folder / name for name in sizes]


def test_folder_is_searched_in_order_for_text_and_without_hidden_empty_or_installed_files(
    tmp_path: Path,
) -> None:
    write(
        tmp_path,
        {
            "z.py": 1,
            "a/b.txt": 2,
            "a/picture.png": 3,
            "a/empty.md": 0,
            ".git/config.txt": 4,
            "site-packages/lib.py": 5,
            "a/__pycache__/c.py": 6,
            "README.MD": 7,
        },
    )
    found = [path.relative_to(tmp_path).as_posix() for path in find_text([tmp_path])]
    assert found == ["README.MD", "z.py", "a/b.txt"]


def test_named_file_is_taken_whatever_its_suffix_and_each_file_once(tmp_path: Path) -> None:
    [odd, text] = write(tmp_path, {"data.bin": 3, "a.txt": 1})
    assert find_text([odd, tmp_path, text, str(odd)]) == [odd, text]


def test_missing_empty_and_textless_paths_say_what_was_found(tmp_path: Path) -> None:
    [empty, _] = write(tmp_path, {"empty.txt": 0, "sub/picture.png": 3})
    with pytest.raises(ValueError, match=r"nowhere does not exist; name a text file or a folder"):
        find_text([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        find_text([empty])
    with pytest.raises(ValueError, match=r"no text found in .*sub; looked for files ending in \.c "):
        find_text([tmp_path / "sub"])
    with pytest.raises(ValueError, match="no text found in no path"):
        find_text([])


def test_stdlib_has_sources_and_no_tests_or_packages() -> None:
    files = stdlib_sources()
    assert files == sorted(set(files), key=files.index)
    assert sum(f.stat().st_size for f in files) > 5_000_000
    assert not {"test", "tests", "site-packages", "idle_test"} & {part for f in files for part in f.parts}


@given(
    sizes=st.lists(st.integers(1, 2000), min_size=2, max_size=30),
    heldout=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_split_is_a_partition_with_neither_side_empty(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], heldout: float, seed: int
) -> None:
    files = write(tmp_path_factory.mktemp("split"), {f"{i}.txt": size for i, size in enumerate(sizes)})
    train, held = split_by_file(files, heldout, seed)
    assert train
    assert held
    assert sorted([*train, *held], key=lambda span: files.index(span.path)) == [
        Span(file, 0, size) for file, size in zip(files, sizes, strict=True)
    ]
    assert [s.path for s in train] == [f for f in files if f in {s.path for s in train}]


def test_split_comes_near_its_share_of_bytes_and_follows_the_seed(tmp_path: Path) -> None:
    files = write(tmp_path, {f"{i}.txt": 100 + 7 * i for i in range(200)})
    sides = [split_by_file(files, 0.1, seed) for seed in (0, 0, 1)]
    total = sum(f.stat().st_size for f in files)
    for _, held in sides:
        assert sum(s.stop or 0 for s in held) == pytest.approx(0.1 * total, abs=1500)
    assert sides[0] == sides[1] != sides[2]


def test_split_does_not_depend_on_where_the_tree_lies_or_on_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {f"sub{i % 3}/{i}.txt": 10 + i for i in range(40)}
    here = write(tmp_path / "here", names)
    there = write(tmp_path / "far" / "away", names)
    held = [[s.path.name for s in split_by_file(files)[1]] for files in (here, there)]
    monkeypatch.chdir(tmp_path)
    relative = [Path(os.path.relpath(path)) for path in here]
    assert held[0] == held[1] == [s.path.name for s in split_by_file(relative)[1]]


@given(size=st.integers(2, 300), heldout=st.floats(0.001, 0.999))
def test_single_file_is_cut_in_two_and_loses_no_byte(
    tmp_path_factory: pytest.TempPathFactory, size: int, heldout: float
) -> None:
    [file] = write(tmp_path_factory.mktemp("one"), {"one.txt": size})
    [train], [held] = split_by_file([file], heldout)
    assert (train.start, held.stop) == (0, size)
    assert train.stop is not None
    assert 0 < train.stop == held.start < size


def test_impossible_splits_are_refused(tmp_path: Path) -> None:
    [one, empty, two] = write(tmp_path, {"one.txt": 1, "empty.txt": 0, "two.txt": 5})
    for files, heldout, message in [
        ([], 0.1, "no files to split"),
        ([one], 0.1, r"one\.txt holds 1 byte; a single file needs at least 2"),
        ([two, empty], 0.1, r"empty\.txt is empty"),
        ([one, two], 1.0, r"heldout=1\.0; should lie in 0 < heldout < 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            split_by_file(files, heldout)
