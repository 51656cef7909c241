import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import toy

from coterie.reproduce import find_papers, load
from coterie.reproduce.results import Result, arm_tables, lines_of, mean_and_sd
from coterie.reproduce.run import reproduce


def run(paper, tmp_path, **options):
    return reproduce(paper, out=tmp_path / "out", progress=False, **options)


def test_every_arm_runs_on_every_seed_and_the_claims_are_judged(paper, tmp_path):
    result = run(paper, tmp_path, first_seed=1)
    assert result.seeds == [1, 2, 3]
    assert toy.ran() == ["a 1", "b 1", "a 2", "b 2", "a 3", "b 3"]
    assert [values["x"] for values in result.arms["a"]] == [4, 6, 8]
    assert [o.verdict for o in result.claims] == ["holds", "holds", "holds", "not tested at this budget"]
    assert result.headline == "3 of 4 claims hold, 1 was not tested."
    assert result.holds


def test_a_claim_that_fails_on_one_seed_does_not_hold(paper, tmp_path):
    result = run(paper, tmp_path)
    failed = result.claims[1]
    assert (failed.verdict, failed.measured, failed.margin) == ("does not hold", 2.0, -1.0)
    assert result.headline == "2 of 4 claims hold, 1 does not, 1 was not tested."
    assert not result.holds


@pytest.mark.parametrize(("budget", "seeds"), [("smoke", 1), ("standard", 3), ("full", 5)])
def test_each_budget_has_its_number_of_seeds(paper, tmp_path, budget, seeds):
    assert len(run(paper, tmp_path, budget=budget).seeds) == seeds
    assert len(run(paper, tmp_path, budget=budget, seeds=2).seeds) == 2


def test_an_interrupted_run_goes_on_arm_by_arm_to_the_same_result(paper, tmp_path, monkeypatch):
    unbroken = run(paper, tmp_path)
    Path(os.environ["LOG"]).unlink()
    monkeypatch.setenv("INTERRUPT", "b 1")
    with pytest.raises(KeyboardInterrupt):
        run(paper, tmp_path)
    assert toy.ran() == ["a 0", "b 0", "a 1"]
    monkeypatch.delenv("INTERRUPT")
    resumed = run(paper, tmp_path)
    assert toy.ran() == ["a 0", "b 0", "a 1", "b 1", "a 2", "b 2"]
    assert (resumed.arms, resumed.claims) == (unbroken.arms, unbroken.claims)


def test_what_an_interrupted_run_of_other_data_or_budget_left_is_not_used(paper, tmp_path, monkeypatch):
    (tmp_path / "three.txt").write_text("3")
    monkeypatch.setenv("INTERRUPT", "b 0")
    with pytest.raises(KeyboardInterrupt):
        run(paper, tmp_path, seeds=1)
    monkeypatch.delenv("INTERRUPT")
    assert run(paper, tmp_path, seeds=1, data=tmp_path / "three.txt").arms["a"][0]["x"] == 6.0
    monkeypatch.setenv("INTERRUPT", "b 0")
    with pytest.raises(KeyboardInterrupt):
        run(paper, tmp_path, seeds=1)
    monkeypatch.delenv("INTERRUPT")
    assert run(paper, tmp_path, budget="smoke").arms["a"][0]["size"] == len("smoke")


def test_a_finished_run_leaves_results_and_page_and_runs_anew_next_time(paper, tmp_path):
    run(paper, tmp_path, seeds=1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["toy.html", "toy.json"]
    run(paper, tmp_path, seeds=1)
    assert toy.ran() == ["a 0", "b 0"] * 2


def test_results_are_kept_with_how_they_were_made(paper, tmp_path):
    (tmp_path / "two.txt").write_text("2")
    result = run(paper, tmp_path, seeds=2, first_seed=5, arms=["b"], data=tmp_path / "two.txt")
    kept = (tmp_path / "out" / "toy.json").read_text()
    assert Result.from_json(kept) == result
    made = result.provenance
    assert made["command"] == (
        f"coterie reproduce toy --budget standard --seeds 2 --first-seed 5 --data {tmp_path}/two.txt --arms b"
    )
    assert made["seeds"] == "5, 6"
    assert torch.__version__ in made["versions"]
    assert "cores" in made["machine"]
    assert all(second >= 0 for second in result.seconds["b"])


def test_claims_about_arms_that_were_left_out_are_not_tested(paper, tmp_path):
    result = run(paper, tmp_path, arms=["b"])
    assert [o.verdict for o in result.claims] == ["not tested without a"] * 2 + [
        "holds",
        "not tested without a",
    ]


def test_the_order_and_presence_of_other_arms_changes_no_number(paper, tmp_path):
    noisy = replace(
        paper,
        arms={name: lambda seed, budget, data: {"x": float(torch.rand(()))} for name in ("a", "b")},
    )
    together = run(noisy, tmp_path, seeds=2).arms["b"]
    assert run(noisy, tmp_path, seeds=2, arms=["b"]).arms["b"] == together
    assert together[0] != together[1]


@pytest.mark.parametrize("value", [float("nan"), [(1, float("inf"))]])
def test_an_arm_that_measures_no_number_stops_the_run(paper, tmp_path, value):
    broken = replace(paper, arms={"a": lambda seed, budget, data: {"x": value}})
    with pytest.raises(RuntimeError, match="arm 'a' measured x = NaN or infinity"):
        run(broken, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "standart"}, "no budget 'standart'; did you mean standard"),
        ({"arms": ["a", "bb"]}, "no arm of toy 'bb'; did you mean b"),
        ({"seeds": 0}, "seeds=0 from 0"),
        ({"first_seed": -1}, "none below 0"),
        ({"data": "nowhere.txt"}, "nowhere.txt does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(paper, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(paper, tmp_path, **options)
    assert toy.ran() == []
    assert not (tmp_path / "out").exists()


def test_data_for_a_paper_that_reads_none_is_refused(paper, tmp_path):
    with pytest.raises(ValueError, match="toy makes its own data"):
        run(replace(paper, read_data=None), tmp_path, data=tmp_path)


def test_tables_show_mean_and_deviation_with_a_line_for_whatever_is_more(paper, tmp_path):
    arms = {
        "one/a": lambda seed, budget, data: {"x": 1.0 + seed},
        "two/a": lambda seed, budget, data: {"y": 0.5, "z": 2.0},
        "one/b": lambda seed, budget, data: {"x": 0.0},
    }
    result = run(replace(paper, arms=arms, claims=[]), tmp_path)
    assert arm_tables(result.arms) == [
        ("one", ["", "x"], [["a", "2.00 ± 1.00"], ["b", "0"]]),
        ("two", ["", "a"], [["y", "0.500"], ["z", "2.00"]]),
    ]
    assert mean_and_sd([3e-12, 5e-12]) == "4.00e-12 ± 1e-12"


def test_a_line_is_the_mean_over_seeds_in_their_range(paper, tmp_path):
    result = run(paper, tmp_path)
    line, _ = lines_of(toy.PLOTS[0], result.arms)
    assert (line.label, line.x, line.y) == ("a", [1, 2], [4, 2])
    assert (line.low, line.high) == ([2, 1], [6, 3])
    points, _ = lines_of(replace(toy.PLOTS[0], points=True), result.arms)
    assert points.x == [1, 2] * 3
    assert [line.label for line in lines_of(replace(toy.PLOTS[0], arms=("b",)), result.arms)] == ["b"]


class Page(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_shows_claims_arms_and_plots_and_refers_to_nothing_outside_itself(paper, tmp_path):
    run(paper, tmp_path)
    text = (tmp_path / "out" / "toy.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not any(tag in ("script", "link", "img", "iframe") for tag, _ in page.elements)
    assert not re.search(r"https?://", text.replace("http://www.w3.org", ""))
    assert "<h1>2 of 4 claims hold, 1 does not, 1 was not tested.</h1>" in text
    assert "Doe, On &lt;Toys&gt;. Nowhere, 2024." in text
    assert '<span class="verdict fails">does not hold</span>' in text
    assert "<small>tried</small>" in text
    assert "4.00 ± 2.00" in text
    assert text.count("<svg") == 2  # one plot, wide and narrow; the other has no curve
    assert "A paper in three lines" in text


def test_training_that_was_interrupted_does_not_count_as_finished(paper, tmp_path):
    script = (
        "import os, signal, torch\n"
        "from torch import nn\n"
        "from coterie.reproduce import train\n"
        "from coterie.train import LossOutput\n"
        "class Stop:\n"
        "    def on_step(self, run): os.kill(os.getpid(), signal.SIGINT)\n"
        "def loss(model, x):\n"
        "    value = model(x).square().mean()\n"
        "    return LossOutput(value, value.detach(), len(x))\n"
        "try:\n"
        "    train(nn.Linear(2, 2), torch.rand(8, 2), loss=loss, steps=9, batch_size=4, callbacks=[Stop()])\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "interrupted\n", done.stderr


@pytest.mark.parametrize("slug", find_papers())
def test_every_paper_runs_at_the_smoke_budget_and_no_claim_fails(slug, tmp_path):
    result = reproduce(slug, budget="smoke", out=tmp_path, progress=False)
    assert result.holds, [o for o in result.claims if o.verdict == "does not hold"]
    assert json.loads((tmp_path / f"{slug}.json").read_text())["slug"] == slug
    page = (tmp_path / f"{slug}.html").read_text()
    assert page.count("<figure") == 2 * len(load(slug).plots)
