import pytest
import torch

from coterie.data import drawn_digits, read_digits


def test_drawn_digits_follow_from_the_seed_and_are_all_there():
    images, digits = drawn_digits(500, seed=3)
    again, same = drawn_digits(500, seed=3)
    assert torch.equal(images, again)
    assert torch.equal(digits, same)
    assert images.shape == (500, 8, 8)
    assert digits.unique().tolist() == list(range(10))
    assert not torch.equal(images, drawn_digits(500, seed=4)[0])


def test_drawn_digits_can_be_told_apart_but_no_two_are_alike():
    images, digits = drawn_digits(1200, seed=0)
    apart = torch.cdist(images.flatten(1), images.flatten(1)).fill_diagonal_(torch.inf)
    assert float(apart.min()) > 0
    nearest = digits[apart.argmin(1)]
    assert 0.9 < (nearest == digits).double().mean().item() < 0.99


def test_the_file_of_handwritten_digits_is_read_pixel_by_pixel(tmp_path):
    rows = torch.randint(17, (5, 64))
    lines = ["# the last number is the digit"]
    lines += [",".join(map(str, [*row.tolist(), i])) for i, row in enumerate(rows)]
    (tmp_path / "optdigits.tes").write_text("\n".join(lines) + "\n")
    images, digits = read_digits(tmp_path / "optdigits.tes")
    assert torch.equal(images * 16, rows.view(5, 8, 8).float())
    assert digits.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n", "no table of numbers"),
        ("1,2,3\n", "has 3 columns; should be 64 pixels and the digit"),
        (",".join(["17"] * 64 + ["3"]), "pixels from 0 to 16"),
        (",".join(["1"] * 64 + ["11"]), "digits from 0 to 9"),
        ("", "has no lines"),
    ],
)
def test_other_files_are_refused_with_a_reason(text, message, tmp_path):
    (tmp_path / "digits.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_digits(tmp_path / "digits.csv")
