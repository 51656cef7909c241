import math

import pytest

from coterie.data import read_stream, stream_chunks

ARFF = """% a comment
@RELATION elec
@attribute 'day name' {Mon, 'Tue night'}
@attribute price NUMERIC
@attribute note string
@attribute class {UP,DOWN}

@DATA
Mon,0.5,"a, b",UP
% another
'Tue night',?,?,DOWN
"""


def test_arff_is_read_in_its_order(tmp_path):
    file = tmp_path / "a.arff"
    file.write_text(ARFF)
    (first, up), (second, down) = read_stream(file)
    assert (up, down) == ("UP", "DOWN")
    assert first == {"day name": "Mon", "price": 0.5, "note": "a, b"}
    assert second["day name"] == "Tue night"
    assert math.isnan(second["price"])
    assert second["note"] is None


def test_csv_is_read_in_its_order_in_chunks_of_any_size(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("label,x,y\n" + "".join(f"c{i % 3},{i},t{i}\n" for i in range(10)))
    expected = [({"x": float(i), "y": f"t{i}"}, f"c{i % 3}") for i in range(10)]
    for rows_at_once in (1, 3, 100):
        assert list(read_stream(file, "label", rows_at_once=rows_at_once)) == expected
    assert next(iter(read_stream(file, "label", features=["x"])))[0] == {"x": 0.0}
    assert next(iter(read_stream(file)))[1] == "t0"  # the last column
    assert [list(frame.index) for frame in stream_chunks(file, 6)] == [[*range(6)], [*range(6, 10)]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ARFF.replace("0.5", "cheap"), "line 9: price is 'cheap'; should be a number"),
        (ARFF.replace('b",UP', 'b",SIDE'), "line 9: class is 'SIDE', which its @attribute does not list"),
        (ARFF.replace(",UP\n", "\n"), "line 9: 3 values for 4 attributes"),
        (ARFF.replace("Mon,0.5", "{0 Mon"), "line 9: a sparse row"),
        (ARFF.replace("NUMERIC", "colour"), "line 4: attribute 'price' is of type 'colour'"),
        (ARFF.split("@DATA")[0], "no rows: no @data line"),
        (ARFF.replace("DOWN\n", "?\n"), "column 'class', row 1: the label is missing"),
    ],
)
def test_what_is_wrong_with_an_arff_file_is_said_with_its_line(tmp_path, text, message):
    file = tmp_path / "a.arff"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_stream(file))


def test_a_missing_label_is_named_by_its_row_in_the_whole_file(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("x,y\n1,a\n2,b\n3,\n")
    with pytest.raises(ValueError, match="column 'y', row 2: the label is missing"):
        list(read_stream(file, rows_at_once=2))
    with pytest.raises(ValueError, match="has no column 'z'"):
        list(read_stream(file, "z"))
    with pytest.raises(ValueError, match="does not exist"):
        list(read_stream(tmp_path / "no.arff"))
