"""Which files make up a corpus, and which of them are held out."""

import hashlib
import os
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# fmt: off
TEXT_SUFFIXES = frozenset({
    ".c", ".cc", ".cfg", ".cpp", ".css", ".csv", ".go", ".h", ".hpp", ".htm", ".html", ".ini", ".java", ".jl",
    ".js", ".json", ".jsonl", ".lua", ".md", ".php", ".py", ".pyi", ".r", ".rb", ".rs", ".rst", ".scala",
    ".sh", ".sql", ".swift", ".tex", ".toml", ".ts", ".tsv", ".txt", ".xml", ".yaml", ".yml",
})
# fmt: on

_SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `stop` (exclusive) of a file; `stop` None is the end of the file."""

    path: Path
    start: int = 0
    stop: int | None = None


def find_text(paths: Sequence[str | Path], suffixes: Collection[str] = TEXT_SUFFIXES) -> list[Path]:
    """The text files that `paths` name, each once, in a fixed order.

    Args:
        paths: files, taken whatever their suffix, and folders, searched recursively. Hidden folders,
            `__pycache__`, `site-packages` and the like are skipped, and so are empty files.
        suffixes: lower-case suffixes a file inside a folder must have, with their dot.

    Returns: paths in the order of `paths`, sorted inside each folder.

    Raises:
        ValueError: a path does not exist, a named file is empty, or no text was found.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("b.txt", "a.md", "picture.png"):
    ...     _ = (folder / name).write_text("text")
    >>> [path.name for path in find_text([folder])]
    ['a.md', 'b.txt']
    """
    found: dict[Path, Path] = {}  # resolved → as named, so that overlapping folders count a file once
    for path in map(Path, paths):
        if path.is_file():
            if path.stat().st_size == 0:
                raise ValueError(f"{path} is empty; name a file with text in it")
            found.setdefault(path.resolve(), path)
        elif path.is_dir():
            for file in _walk(path, _SKIPPED_FOLDERS):
                if file.suffix.lower() in suffixes:
                    found.setdefault(file.resolve(), file)
        else:
            raise ValueError(f"{path} does not exist; name a text file or a folder of them")
    if not found:
        named = ", ".join(map(str, paths)) or "no path"
        raise ValueError(f"no text found in {named}; looked for files ending in {' '.join(sorted(suffixes))}")
    return list(found.values())


def stdlib_sources() -> list[Path]:
    """This interpreter's standard library as `.py` files, without its tests and installed packages.

    Raises:
        ValueError: this Python was installed without its sources.

    >>> {"argparse.py", "textwrap.py"} <= {path.name for path in stdlib_sources()}
    True
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [f for f in _walk(folder, _SKIPPED_FOLDERS | _TEST_FOLDERS) if f.suffix == ".py"]
    if not files:
        raise ValueError(f"{folder} holds no .py files: this Python has no sources; name text of your own")
    return files


def split_by_file(
    files: Sequence[str | Path], heldout: float = 0.1, seed: int = 0
) -> tuple[list[Span], list[Span]]:
    """Sets whole files aside, so that held-out text shares no file with training text.

    Which files depends on their sizes, on `seed` and on their names below their common folder: the same
    tree under another prefix, or on another machine, splits alike. A single file is cut in two instead, its
    last `heldout` share of bytes held out.

    Args:
        files: at least one, none empty.
        heldout: share of all bytes to hold out, 0 < heldout < 1; met as nearly as whole files allow.
        seed: another seed holds out other files.

    Returns: (training, held-out) spans, neither empty, both in the order of `files`.

    Raises:
        ValueError: no files, an empty one, or a share outside (0, 1).

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "one.txt"
    >>> _ = file.write_text("0123456789")
    >>> [(span.start, span.stop) for side in split_by_file([file], heldout=0.2) for span in side]
    [(0, 8), (8, 10)]
    """
    if not 0 < heldout < 1:
        raise ValueError(f"heldout={heldout}; should lie in 0 < heldout < 1")
    paths = [Path(f) for f in files]
    if not paths:
        raise ValueError("no files to split; give at least one")
    sizes = [path.stat().st_size for path in paths]
    if 0 in sizes:
        raise ValueError(f"{paths[sizes.index(0)]} is empty; leave it out")
    if len(paths) == 1:
        return _cut(paths[0], sizes[0], heldout)
    held = _choose(_order(paths, seed), sizes, heldout)
    spans = [Span(path, 0, size) for path, size in zip(paths, sizes, strict=True)]
    return (
        [span for i, span in enumerate(spans) if i not in held],
        [span for i, span in enumerate(spans) if i in held],
    )


def _walk(folder: Path, skipped: Collection[str]) -> Iterator[Path]:
    """Non-empty files below `folder`, in sorted order."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        for name in sorted(names):
            file = Path(parent, name)
            if file.is_file() and file.stat().st_size:
                yield file


def _cut(path: Path, size: int, heldout: float) -> tuple[list[Span], list[Span]]:
    if size < 2:
        raise ValueError(f"{path} holds {size} byte; a single file needs at least 2 to be split")
    cut = min(max(size - round(size * heldout), 1), size - 1)
    return [Span(path, 0, cut)], [Span(path, cut, size)]


def _order(paths: Sequence[Path], seed: int) -> list[int]:
    """Indices of the files in a random order that depends on names and seed alone."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    root = os.path.commonpath([path.parent for path in absolute])
    names = [path.relative_to(root).as_posix() for path in absolute]
    hashes = [hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest() for name in names]
    return sorted(range(len(paths)), key=lambda i: (hashes[i], i))


def _choose(order: Sequence[int], sizes: Sequence[int], heldout: float) -> set[int]:
    target, total, held = heldout * sum(sizes), 0, set()
    for i in order:
        if total + sizes[i] / 2 <= target:  # taking it brings the total nearer to the target
            held.add(i)
            total += sizes[i]
    smallest = min(order, key=lambda i: sizes[i])
    if not held:
        return {smallest}
    return held - {smallest} if len(held) == len(sizes) else held
