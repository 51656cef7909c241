"""Public records of decisions about people, as plain tables: US mortgage applications (HMDA), COMPAS."""

import re
from typing import TYPE_CHECKING

from coterie.data.tables import check_columns, import_pandas

if TYPE_CHECKING:
    import pandas as pd

MORTGAGE_FEATURES = ("loan_amount", "income", "debt_to_income_ratio", "loan_to_value_ratio")
COMPAS_FEATURES = (
    "age",
    "sex",
    "priors_count",
    "juv_fel_count",
    "juv_misd_count",
    "juv_other_count",
    "c_charge_degree",
)


def mortgages(frame: "pd.DataFrame", sensitive: str = "derived_race") -> "pd.DataFrame":
    """Decided applications of a Loan Application Register (HMDA LAR, 2018 and later), ready to learn from.

    Keeps `action_taken` 1 (originated) and 3 (denied), the four numbers of `MORTGAGE_FEATURES`, the protected
    column, and `activity_year` where there is one. Debt-to-income, which is published in bins, becomes the
    middle of its bin, or the bound of an open one; "NA" and "Exempt" are missing.

    Args:
        frame: rows as published.
        sensitive: "derived_race" or "derived_sex", or any other column.

    Returns: a frame whose `action_taken` is 1 for originated and 0 for denied.

    Raises ValueError: a missing column, a missing group, or text where a number should be (which row).

    Source: FFIEC, HMDA data fields with values and definitions.

    >>> pd = import_pandas()
    >>> rows = {"action_taken": [1, 3, 6], "loan_amount": [205000, 95000, 1], "income": [74, None, 1]}
    >>> rows |= {"debt_to_income_ratio": ["20%-<30%", ">60%", "36"]}
    >>> rows |= {"loan_to_value_ratio": ["80.1", "Exempt", "1"], "derived_race": ["White", "Asian", "White"]}
    >>> mortgages(pd.DataFrame(rows)).values.tolist()
    [[205000.0, 74.0, 25.0, 80.1, 'White', 1], [95000.0, nan, 60.0, nan, 'Asian', 0]]
    """
    pd = import_pandas()
    check_columns(frame, ["action_taken", *MORTGAGE_FEATURES, sensitive], "the HMDA table")
    kept = frame[frame["action_taken"].isin([1, 3])]
    ratio = kept["debt_to_income_ratio"].map(_middle)
    columns = {name: _numbers(kept[name]) for name in MORTGAGE_FEATURES if name != "debt_to_income_ratio"}
    columns["debt_to_income_ratio"] = _numbers(ratio)
    table = pd.DataFrame({name: columns[name] for name in MORTGAGE_FEATURES})
    if "activity_year" in frame.columns:
        table["activity_year"] = kept["activity_year"]
    table[sensitive] = kept[sensitive]
    table["action_taken"] = (kept["action_taken"] == 1).astype(int)
    return table


def compas(frame: "pd.DataFrame") -> "pd.DataFrame":
    """ProPublica's `compas-scores-two-years.csv`, with its filters: 6172 of 7214 rows.

    Keeps rows whose charge is from within 30 days of the screening, with known recidivism, and no ordinary
    traffic offence; of those, the columns of `COMPAS_FEATURES`, `race`, and the label `two_year_recid`.

    Raises ValueError for a missing column.

    Source: Larson et al. 2016, "How We Analyzed the COMPAS Recidivism Algorithm".
    """
    filters = ["days_b_screening_arrest", "is_recid"]
    wanted = [*COMPAS_FEATURES, "race", "two_year_recid"]
    check_columns(frame, [*filters, *wanted], "the COMPAS table")
    near = frame["days_b_screening_arrest"].abs() <= 30
    kept = near & (frame["is_recid"] != -1) & (frame["c_charge_degree"] != "O")
    return frame.loc[kept, wanted]


def _middle(text: object) -> object:
    """The middle of a bin such as "30%-<36%"; the bound of "<20%"; anything else as it is."""
    bounds = re.fullmatch(r"[<>]?(\d+)%(?:-<?(\d+)%)?", str(text))
    if bounds is None:
        return text
    low, high = bounds.group(1), bounds.group(2) or bounds.group(1)
    return (float(low) + float(high)) / 2


def _numbers(column: "pd.Series") -> "pd.Series":
    pd = import_pandas()
    known = column.where(~column.isin(["NA", "Exempt"]))
    numbers = pd.to_numeric(known, errors="coerce").astype(float)
    wrong = known[numbers.isna() & known.notna()]
    if len(wrong):
        raise ValueError(
            f"column {column.name!r}, row {wrong.index[0]}: {wrong.iloc[0]!r} where a number should be"
        )
    return numbers
