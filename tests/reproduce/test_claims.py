import math

import pytest

from coterie.reproduce import Claim

SEEDS = [{"a": {"x": 1.0}, "b": {"x": 0.4}}, {"a": {"x": 3.0}, "b": {"x": 2.1}}]


def ratio(arms):
    return arms["b"]["x"] / arms["a"]["x"]


def test_over_the_mean_the_numbers_are_averaged_before_they_are_compared():
    outcome = Claim("", ratio, at_most=0.63).judge(SEEDS, "standard")
    assert outcome.measured == pytest.approx(2.5 / 4.0)  # not the mean of 0.4 and 0.7
    assert outcome.verdict == "holds"
    assert outcome.margin == pytest.approx(0.63 - 0.625)


@pytest.mark.parametrize(
    ("margin", "worst"), [({"at_most": 0.69}, 0.7), ({"at_least": 0.41}, 0.4)], ids=["at most", "at least"]
)
def test_over_each_seed_the_worst_one_decides(margin, worst):
    outcome = Claim("", ratio, **margin, over="each seed").judge(SEEDS, "standard")
    assert outcome.measured == pytest.approx(worst)
    assert outcome.verdict == "does not hold"
    assert outcome.margin == pytest.approx(-0.01)


def test_the_margin_itself_is_enough():
    for margin in ({"at_most": 2.0}, {"at_least": 2.0}):
        assert Claim("", lambda arms: 2.0, **margin).judge(SEEDS, "standard").verdict == "holds"


@pytest.mark.parametrize("measure", [lambda arms: math.nan, lambda arms: 1 / 0], ids=["nan", "share of 0"])
@pytest.mark.parametrize("margin", [{"at_most": 1.0}, {"at_least": 1.0}], ids=["at most", "at least"])
@pytest.mark.parametrize("over", ["mean", "each seed"])
def test_what_is_no_number_holds_nothing(measure, margin, over):
    outcome = Claim("", measure, **margin, over=over).judge(SEEDS, "standard")
    assert (outcome.verdict, outcome.measured, outcome.margin) == ("does not hold", None, None)
    assert Claim("", measure, **margin).judge(SEEDS, "smoke").verdict == "not tested at this budget"


@pytest.mark.parametrize(
    ("needs", "budget", "tested"),
    [
        ("standard", "smoke", False),
        ("full", "standard", False),
        ("smoke", "smoke", True),
        ("standard", "full", True),
    ],
)
def test_a_budget_below_the_claims_gives_a_number_and_no_verdict(needs, budget, tested):
    outcome = Claim("", ratio, at_most=0.1, budget=needs).judge(SEEDS, budget)
    assert outcome.verdict == ("does not hold" if tested else "not tested at this budget")
    assert outcome.measured is not None


def test_a_claim_about_an_arm_that_was_left_out_is_not_tested():
    only_b = [{"b": {"x": 1.0}}]
    outcome = Claim("", ratio, at_most=0.1).judge(only_b, "standard", left_out=["a"])
    assert (outcome.verdict, outcome.measured) == ("not tested without a", None)


def test_a_claim_about_an_arm_or_a_number_that_does_not_exist_is_a_fault_of_the_paper_file():
    with pytest.raises(KeyError, match="c"):
        Claim("", lambda arms: arms["c"]["x"], at_most=0).judge(SEEDS, "standard", left_out=["a"])
    with pytest.raises(KeyError, match="y"):
        Claim("", lambda arms: arms["a"]["y"], at_most=0).judge(SEEDS, "standard")


@pytest.mark.parametrize("margins", [{}, {"at_least": 1, "at_most": 2}])
def test_a_claim_has_exactly_one_margin(margins):
    with pytest.raises(ValueError, match="give either at_least or at_most"):
        Claim("", ratio, **margins)
