import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import arms

from coterie.report import (
    Arm,
    compare,
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_rate,
    headline,
    print_table,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_table_is_plain_aligned_text_when_not_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    print_table(
        "[red]run[/red]", ["", "dense", "MoE"], [["bits", "1.9", "[b]"], ["日本", "1", "22222"]], file=file
    )
    assert file.getvalue() == "[red]run[/red]\n      dense    MoE\nbits    1.9    [b]\n日本      1  22222\n"


def test_a_table_is_ruled_on_a_terminal_and_shows_markup_as_it_is(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = Terminal()
    print_table("[red]run[/red]", ["", "MoE"], [["bits", "[b]"]], file=file)
    assert "[red]run[/red]" in file.getvalue()
    assert "[b]" in file.getvalue()
    assert "─" in file.getvalue()
    assert "\x1b[" in file.getvalue()


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="row 2 has 1 cells under 2 columns"):
        print_table("run", ["", "MoE"], [["bits", "1"], ["bits"]], file=io.StringIO())


@given(st.floats(0, 1e15))
def test_counts_keep_three_digits(count):
    text = format_count(count)
    number, unit = (*text.split(), "")[:2]
    value = float(number) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[unit]
    assert value == pytest.approx(count, rel=0.0051, abs=0.5)
    assert len(number.replace(".", "")) <= 4
    assert float(number) < 1000 or unit == "T"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_count(0), "0"),
        (format_count(999_499), "999 k"),
        (format_count(7_240_000_000), "7.24 B"),
        (format_bytes(1023), "1023 B"),
        (format_bytes(1000 * 2**20), "1000 MiB"),
        (format_bytes(1.5 * 2**30), "1.50 GiB"),
        (format_rate(1_234_567.8), "1 234 568"),
        (format_number(-0.5), "-0.50"),
        (format_duration(59.97), "1 min 0 s"),
        (format_duration(7199.9), "2 h 0 min"),
    ],
)
def test_numbers_are_written_as_a_reader_expects(text, expected):
    assert text == expected


def test_what_was_not_measured_is_a_dash():
    formats = (format_count, format_bytes, format_rate, format_number, format_duration)
    assert {form(None) for form in formats} == {"–"}


def test_the_comparison_has_a_column_per_arm():
    columns, rows = compare(arms())
    assert columns == ["", "dense", "MoE"]
    assert {len(row) for row in rows} == {3}
    assert ["peak memory", "312 MiB", "–"] in rows


def test_the_headline_says_who_won():
    assert headline(arms(dense=1.9, moe=1.8)) == (
        "The MoE reaches 1.800 bits per byte on held-out text, the dense model 1.900, "
        "at the same active parameters and tokens. It needs 5.3% fewer bits."
    )


def test_the_headline_is_honest_when_the_method_loses_or_ties():
    assert headline(arms(1.8, 1.9)).endswith("It needs 5.6% more bits: the dense model is ahead.")
    assert headline(arms(1.8, 1.80004)).endswith("The two are level.")


def test_the_headline_does_not_claim_equal_budgets_that_differ():
    dense, moe = arms()
    moe.active_parameters *= 2
    assert "at 2.86 M active parameters against 1.43 M and the same tokens" in headline([dense, moe])
    moe.active_parameters, moe.tokens = dense.active_parameters, 10**6
    assert "at the same active parameters and 1.00 M tokens against 9.80 M" in headline([dense, moe])


def test_a_headline_of_one_arm_states_it_and_of_none_is_refused():
    arm = Arm("MoE", 1, 1, 1, 1.5, 1.0)
    assert headline([arm]) == "The MoE reaches 1.500 bits per byte on held-out text."
    with pytest.raises(ValueError, match="at least one"):
        headline([])


def test_a_narrow_terminal_folds_what_it_has_no_room_for_and_cuts_nothing(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    file = Terminal()
    print_table(
        "run", ["layer", "busiest load", "experts"], [["model.layers.0.mlp", "1.36", "10 11 12"]], file=file
    )
    assert "…" not in file.getvalue()
