import numpy as np
import pandas as pd
import pytest

from coterie.reproduce.feamoe import drifting, read_data


def register(rows=2000, groups=("a", "b")):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "activity_year": rng.choice([2018, 2019], rows, p=[0.25, 0.75]),
            "action_taken": rng.choice([1, 3], rows),
            "loan_amount": rng.normal(200, 50, rows),
            "income": rng.normal(80, 20, rows),
            "debt_to_income_ratio": rng.choice(["<20%", "36"], rows),
            "loan_to_value_ratio": rng.choice(["80", "Exempt"], rows),
            "derived_race": rng.choice(groups, rows),
        }
    )


def test_a_register_is_a_stream_by_year_without_groups_too_small_to_count(tmp_path):
    table = register()
    table.loc[:10, "derived_race"] = "c"
    table.loc[11, "derived_race"] = None
    table.to_csv(tmp_path / "lar.csv", index=False)
    stream = read_data(tmp_path / "lar.csv")
    assert (len(stream.chunks), stream.drift) == (4, 2)
    assert {name for chunk in stream.chunks for name in chunk.group} == {"a", "b"}
    assert sum(len(chunk.y) for chunk in stream.chunks) == 1988
    assert "activity_year" not in stream.chunks[0].X


def test_compas_is_a_stream_too(data_dir):
    file = data_dir / "tabular" / "compas-scores-two-years.csv"
    if not file.is_file():
        pytest.skip(f"no {file}")
    stream = read_data(file)
    assert len(stream.chunks) == 4
    assert set(stream.chunks[0].group) == {"African-American", "Caucasian", "Hispanic", "Other"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame({"x": [1]}), "neither action_taken"),
        (register(700), "has 700 usable rows of 2 groups; give at least 800 of two"),
        (register(groups=("a",)), "2000 usable rows of 1 groups"),
    ],
)
def test_what_makes_no_stream_is_refused(table, message, tmp_path):
    table.to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path / "table.csv")


def test_only_the_group_that_the_drift_is_against_falls_behind():
    stream = drifting(0, "standard")
    y, group = (np.array([getattr(chunk, name) for chunk in stream.chunks]) for name in ("y", "group"))
    steady, late = slice(0, stream.drift), slice(stream.drift, None)
    before, after = (
        y[part][group[part] == 0].mean() - y[part][group[part] == 1].mean() for part in (steady, late)
    )
    assert abs(before) < 0.03
    assert after > 0.15
