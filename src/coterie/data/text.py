"""Text files as one long sequence of byte tokens, and that sequence as windows to train on.

The vocabulary is 257 ids: the 256 bytes, and 256 for the end of a text. Bytes that are no valid UTF-8 are
tokens like any other.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from coterie.data.files import Span
from coterie.data.tokenizer import END_OF_TEXT


class ByteCorpus:
    """Files as one virtual sequence of token ids, an end-of-text id after each.

    Nothing is copied: an index of sizes is kept, and files are memory-mapped as they are read.

    Args:
        files: paths or spans of files; empty ones add nothing, not even their end of text.

    Raises:
        ValueError: a file is missing, a span lies outside its file, or there is no byte in all of them.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.txt"
    >>> _ = file.write_bytes(b"ab")
    >>> corpus = ByteCorpus([file, file])
    >>> len(corpus), corpus.num_bytes, corpus.read(1, 4).tolist()
    (6, 4, [98, 256, 97, 98])
    """

    files: list[Span]
    """The spans that hold at least a byte, with `stop` filled in."""

    def __init__(self, files: Sequence[str | Path | Span]) -> None:
        indexed = [_index(f if isinstance(f, Span) else Span(Path(f))) for f in files]
        self.files = [span for span, _ in indexed if _length(span)]
        self._sizes = [size for span, size in indexed if _length(span)]
        if not self.files:
            raise ValueError(f"the corpus is empty: {len(files)} files with no byte of text in them")
        self._starts = [0, *accumulate(_length(span) + 1 for span in self.files)]

    def __len__(self) -> int:
        """Tokens: bytes, and one end of text per file."""
        return self._starts[-1]

    @property
    def num_bytes(self) -> int:
        """Bytes of text, without the ends of text."""
        return len(self) - len(self.files)

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Token ids `start` to `start + length - 1`.

        Raises:
            IndexError: the range leaves the corpus.
            ValueError: a file has changed its size since the corpus was indexed.
        """
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of a corpus of {len(self)}")
        ids = np.full(length, END_OF_TEXT, dtype=np.int64)
        at = start
        while at < start + length:
            i = bisect_right(self._starts, at) - 1
            first = at - self._starts[i]
            count = min(_length(self.files[i]) - first, start + length - at)
            if count > 0:
                ids[at - start : at - start + count] = self._map(i)[first : first + count]
            at = min(self._starts[i + 1], start + length)
        return ids

    def _map(self, i: int) -> npt.NDArray[np.uint8]:
        span, size = self.files[i], self._sizes[i]
        found = _size(span.path)
        if found != size:
            raise ValueError(
                f"{span.path} had {size} bytes when the corpus was indexed and has {found} now; start again"
            )
        return np.memmap(span.path, np.uint8, "r", offset=span.start, shape=(_length(span),))


class ByteWindows(Dataset[Tensor]):
    """A corpus in consecutive windows for next-token prediction.

    Args:
        corpus: the text.
        seq_len: tokens the model sees at once.

    Item i is int64 [seq_len + 1]: inputs are its first seq_len ids, targets its last. Inputs of different
    windows do not overlap; a rest shorter than a window is left out.

    Raises:
        ValueError: the corpus is shorter than one window.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.txt"
    >>> _ = file.write_bytes(bytes(range(9)))
    >>> windows = ByteWindows(ByteCorpus([file]), seq_len=4)
    >>> len(windows), windows[1].tolist()
    (2, [4, 5, 6, 7, 8])
    """

    def __init__(self, corpus: ByteCorpus, seq_len: int) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len}; should be at least 1")
        self.corpus, self.seq_len = corpus, seq_len
        self.check_batch(1)

    def __len__(self) -> int:
        return (len(self.corpus) - 1) // self.seq_len

    def __getitem__(self, i: int) -> Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        return torch.from_numpy(self.corpus.read(i * self.seq_len, self.seq_len + 1))

    def check_batch(self, batch_size: int) -> None:
        """ValueError unless the corpus fills one batch of `batch_size` windows."""
        if len(self) < batch_size:
            raise ValueError(
                f"the corpus has {len(self.corpus)} tokens; {batch_size} × {self.seq_len} + 1 = "
                f"{batch_size * self.seq_len + 1} are needed for one batch: add text, or use a smaller "
                "batch_size or seq_len"
            )


def _index(span: Span) -> tuple[Span, int]:
    """The span with its stop filled in, and the size of its file."""
    size = _size(span.path)
    stop = size if span.stop is None else span.stop
    if not 0 <= span.start <= stop <= size:
        raise ValueError(f"{span.path} has {size} bytes; bytes {span.start} to {stop} lie outside it")
    return Span(span.path, span.start, stop), size


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; was it moved or removed?") from None


def _length(span: Span) -> int:
    assert span.stop is not None, "an indexed span knows its stop"
    return span.stop - span.start
