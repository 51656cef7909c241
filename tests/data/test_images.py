import importlib.util

import pytest
import torch

from coterie.data import digits, read_digits


def line(levels, label):
    return ",".join(map(str, [*levels, label]))


def test_a_file_of_digits_becomes_images_row_by_row(tmp_path):
    ramp = [(row + column) for row in range(8) for column in range(8)]
    (tmp_path / "some.tes").write_text("\n".join([line(ramp, 3), line([16] * 64, 9)]))
    images, labels = read_digits(tmp_path / "some.tes")
    assert images.shape == (2, 8, 8)
    assert images.dtype == torch.float32
    assert labels.tolist() == [3, 9]
    assert images[0, 2, 5].item() == 7 / 16
    assert bool((images[1] == 1).all())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n", "is not a table of numbers"),
        (line([1] * 10, 3), "has 11 columns; a file of digits has 64 grey levels and the digit"),
        (line([17] * 64, 3), r"grey levels 17 … 17 and labels 3 … 3; should be 0 … 16"),
        (line([1] * 64, 12), r"labels 12 … 12; should be"),
    ],
)
def test_another_file_is_refused_with_what_was_found(text, message, tmp_path):
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_digits(tmp_path / "other.csv")


def test_scikit_learns_digits_are_whole():
    pytest.importorskip("sklearn", reason="scikit-learn, which brings the digits, is not installed")
    images, labels = digits()
    assert images.shape == (1797, 8, 8)
    assert (float(images.min()), float(images.max())) == (0, 1)
    assert labels[:10].tolist() == list(range(10))
    assert int(labels.bincount().min()) > 170


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed: pip install 'coterie\[vision\]'"):
        digits()
