import gzip

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.data import TableEncoder, read_table, table_chunks


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.parquet"])
def test_every_format_gives_the_same_table_whole_and_in_chunks(tmp_path, name):
    table = pd.DataFrame(
        {"a": [1, 2, 3, 4, 5], "b": ["x", "y", None, "x", "z"], "c": [0.5, None, 1.5, 2.0, 3.0]}
    )
    file = tmp_path / name
    if name == "t.parquet":
        table.to_parquet(file, index=False)
    else:
        table.to_csv(file, index=False, sep="\t" if ".tsv" in name else ",")
    whole = read_table(file)
    assert whole["a"].tolist() == [1, 2, 3, 4, 5]
    assert whole.isna().sum().tolist() == [0, 1, 1]
    chunks = list(table_chunks(file, 2))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert pd.concat(chunks)["c"].sum() == table["c"].sum()


def test_types_in_the_header_of_recbole_files_are_dropped(tmp_path):
    (tmp_path / "l.inter").write_text("user_id:token\titem_id:token\n1\t2\n")
    assert list(read_table(tmp_path / "l.inter").columns) == ["user_id", "item_id"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "does not exist"),
        ("t.xlsx", b"x", r"ends in '.xlsx'"),
        ("t.csv", b"", "cannot be read as csv"),
        ("t.csv", b"a,b\n", "has no rows"),
        ("t.csv", b'a,b\n1,2\n3,4,5\n"', "cannot be read as csv"),
        ("t.parquet", b"no parquet at all", "cannot be read as parquet"),
        ("t.csv.gz", b"no gzip", "cannot be read as csv"),
    ],
)
def test_unreadable_files_say_why(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


def test_two_columns_of_one_name_are_refused_in_parquet_and_inter(tmp_path):
    (tmp_path / "l.inter").write_bytes(b"u:token\tu:float\n1\t2\n")
    with pytest.raises(ValueError, match="two columns named 'u'"):
        read_table(tmp_path / "l.inter")


def test_a_compressed_table_is_read(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"a\n1\n"))
    assert read_table(tmp_path / "t.csv.gz")["a"].tolist() == [1]


numbers = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=12)


@given(numbers, st.lists(st.sampled_from(["a", "b", "c", None]), min_size=12, max_size=12))
def test_features_are_finite_and_come_back_from_the_dictionary(values, texts):
    frame = pd.DataFrame(
        {"n": pd.Series(values, dtype=float), "t": pd.Series(texts[: len(values)], dtype=object)}
    )
    encoder = TableEncoder().fit(frame)
    features = encoder.transform(frame)
    assert features.shape == (len(frame), len(encoder.feature_names)) == (len(frame), len(encoder.source))
    assert np.isfinite(features).all()
    again = TableEncoder.from_dict(encoder.to_dict())
    assert np.array_equal(again.transform(frame), features)
    one_hot = [i for i, name in enumerate(encoder.source) if name == "t"]
    assert (features[:, one_hot].sum(1) == frame["t"].notna()).all()


def test_numbers_are_standardised_over_the_fitted_frame():
    frame = pd.DataFrame({"a": [1.0, 2.0, 6.0], "b": [True, False, True], "same": 7})
    features = TableEncoder().fit(frame).transform(frame)
    assert np.allclose(features.mean(0), 0, atol=1e-6)
    assert np.allclose(features.std(0), [1, 1, 0])


def test_whole_numbers_and_texts_of_one_category_agree():
    encoder = TableEncoder().fit(pd.DataFrame({"t": ["1", "2"]}))
    for kind in (int, float, np.float32, object, str, "category"):
        assert encoder.transform(pd.DataFrame({"t": [2, 1]}).astype(kind)).tolist() == [[0, 1], [1, 0]]
    with_a_gap = pd.DataFrame({"t": [2, None, 1]})  # pandas makes floats of them
    assert encoder.transform(with_a_gap).tolist() == [[0, 1], [0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"a": [1.0, float("inf")]}, "column 'a', row 1: infinite"),
        ({"id": [f"person {i}" for i in range(300)]}, "300 categories, more than 200"),
        ({}, "0 feature columns"),
    ],
)
def test_columns_that_cannot_be_features_are_refused(frame, message):
    with pytest.raises(ValueError, match=message):
        TableEncoder().fit(pd.DataFrame(frame))
