import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.data import ByteCorpus, ByteWindows, Span, split_by_file

texts = st.lists(st.binary(max_size=40), min_size=1, max_size=6).filter(any)


def corpus_of(folder: Path, contents: list[bytes]) -> ByteCorpus:
    files = [folder / f"{i}.txt" for i in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    return ByteCorpus(files)


def ids_of(contents: list[bytes]) -> list[int]:
    return [token for content in contents if content for token in [*content, 256]]


@given(contents=texts, data=st.data())
def test_any_range_reads_as_the_files_joined_with_ends_of_text(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], data: st.DataObject
) -> None:
    corpus = corpus_of(tmp_path_factory.mktemp("corpus"), contents)
    expected = ids_of(contents)
    assert (len(corpus), corpus.num_bytes) == (len(expected), sum(map(len, contents)))
    start = data.draw(st.integers(0, len(corpus)))
    length = data.draw(st.integers(0, len(corpus) - start))
    ids = corpus.read(start, length)
    assert ids.dtype == np.int64
    assert ids.tolist() == expected[start : start + length]


@given(contents=texts, seq_len=st.integers(1, 30))
def test_windows_cover_the_corpus_once_and_targets_follow_inputs(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], seq_len: int
) -> None:
    corpus, ids = corpus_of(tmp_path_factory.mktemp("corpus"), contents), ids_of(contents)
    if len(ids) < seq_len + 1:
        with pytest.raises(ValueError, match=f"has {len(ids)} tokens; .* {seq_len + 1} are needed"):
            ByteWindows(corpus, seq_len)
        return
    windows = ByteWindows(corpus, seq_len)
    items = torch.stack([windows[i] for i in range(len(windows))])
    covered = len(windows) * seq_len
    assert len(ids) - 1 - covered < seq_len
    assert items[:, :-1].flatten().tolist() == ids[:covered]
    assert items[:, 1:].flatten().tolist() == ids[1 : covered + 1]


def test_the_two_sides_of_a_cut_file_together_hold_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(100)))
    train, held = (ByteCorpus(side) for side in split_by_file([file], heldout=0.3))
    assert train.read(0, len(train)).tolist() == [*range(70), 256]
    assert held.read(0, len(held)).tolist() == [*range(70, 100), 256]


def test_windows_travel_to_data_loader_workers(tmp_path: Path) -> None:
    windows = ByteWindows(corpus_of(tmp_path, [b"hello world"]), 5)
    assert pickle.loads(pickle.dumps(windows))[1].tolist() == windows[1].tolist()
    assert len(list(windows)) == 2  # iteration ends


def test_corpus_too_small_for_a_batch_names_both_sizes(tmp_path: Path) -> None:
    windows = ByteWindows(corpus_of(tmp_path, [b"x" * 40]), 10)
    windows.check_batch(4)
    with pytest.raises(ValueError, match=r"has 41 tokens; 5 × 10 \+ 1 = 51 are needed for one batch"):
        windows.check_batch(5)


def test_file_that_changed_since_indexing_is_an_error(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [b"abc", b"defg"])
    (tmp_path / "1.txt").write_bytes(b"defgh")
    assert corpus.read(0, 4).tolist() == [97, 98, 99, 256]
    with pytest.raises(ValueError, match=r"1\.txt had 4 bytes when the corpus was indexed and has 5 now"):
        corpus.read(0, 5)
    (tmp_path / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"1\.txt does not exist"):
        corpus.read(0, 5)


def test_empty_missing_and_outside_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the corpus is empty: 2 files"):
        corpus_of(tmp_path, [b"", b""])
    with pytest.raises(ValueError, match=r"nowhere\.txt does not exist"):
        ByteCorpus([tmp_path / "nowhere.txt"])
    corpus = corpus_of(tmp_path, [b"abc"])
    with pytest.raises(ValueError, match=r"has 3 bytes; bytes 2 to 9 lie outside it"):
        ByteCorpus([Span(tmp_path / "0.txt", 2, 9)])
    with pytest.raises(IndexError, match="tokens 2 to 5 of a corpus of 4"):
        corpus.read(2, 3)
    with pytest.raises(ValueError, match="seq_len=0"):
        ByteWindows(corpus, 0)


def test_a_real_text_comes_back_byte_for_byte(data_dir):
    file = data_dir / "text" / "tinyshakespeare.txt"
    corpus = ByteCorpus([file])
    ids = corpus.read(0, len(corpus))
    assert bytes(ids[:-1].astype(np.uint8)) == file.read_bytes()
    assert ids[-1] == 256
