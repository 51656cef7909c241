import pandas as pd
import pytest

from coterie.data import COMPAS_FEATURES, compas, mortgages, read_table

APPLICATIONS = {
    "activity_year": [2019] * 6,
    "action_taken": [1, 3, 2, 1, 3, 1],
    "loan_amount": [205000.0, 95000, 1, 2, 3, 4],
    "income": [74.0, None, 1, "NA", 5, 6],
    "debt_to_income_ratio": ["20%-<30%", ">60%", "36", "41", "<20%", "Exempt"],
    "loan_to_value_ratio": ["80.1", "Exempt", "1", "95", "NA", "70"],
    "derived_race": list("abcabc"),
    "derived_sex": list("fmfmfm"),
    "lei": ["x"] * 6,
}


def test_only_decided_applications_stay_and_their_bins_are_numbers():
    table = mortgages(pd.DataFrame(APPLICATIONS), "derived_sex")
    assert table["action_taken"].tolist() == [1, 0, 1, 0, 1]
    assert table["debt_to_income_ratio"].fillna(-1).tolist() == [25, 60, 41, 20, -1]
    assert table["income"].isna().tolist() == [False, True, True, False, False]
    assert "derived_sex" in table.columns
    assert "lei" not in table.columns


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loan_amount": None}, "the HMDA table has no column 'loan_amount'"),
        ({"income": ["lots", *range(5)]}, "column 'income', row 0: 'lots' where a number should be"),
    ],
)
def test_what_is_no_application_register_is_refused(change, message):
    frame = pd.DataFrame({k: v for k, v in (APPLICATIONS | change).items() if v is not None})
    with pytest.raises(ValueError, match=message):
        mortgages(frame)


def test_compas_keeps_the_rows_that_propublica_kept(data_dir):
    file = data_dir / "tabular" / "compas-scores-two-years.csv"
    if not file.is_file():
        pytest.skip(f"no {file}")
    table = compas(read_table(file))
    assert len(table) == 6172
    assert table["two_year_recid"].mean() == pytest.approx(0.455, abs=0.001)
    assert set(COMPAS_FEATURES) < set(table.columns)


def test_another_table_is_not_compas():
    with pytest.raises(ValueError, match="the COMPAS table has no column"):
        compas(pd.DataFrame({"race": ["a"]}))
