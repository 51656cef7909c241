import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toy

from coterie import cli
from coterie.reproduce import experiment, find_papers, read_card, search
from coterie.reproduce import run as running

COTERIE = str(Path(sys.executable).with_name("coterie"))


@pytest.fixture
def coterie(coterie, monkeypatch, tmp_path, paper):
    """Runs a command line in this process, with the toy paper in place of all others: (status, out, err)."""
    monkeypatch.setattr(experiment, "find_papers", lambda: {"toy": Path(toy.__file__)})
    monkeypatch.setattr(running, "load", lambda slug: experiment.check_slug(slug) or paper)
    monkeypatch.chdir(tmp_path)
    return coterie


def test_papers_lists_searches_and_shows_one(capsys):
    from coterie.reproduce.listing import print_papers

    print_papers()
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(find_papers())
    print_papers("PRIMAL-DUAL 2025")
    assert capsys.readouterr().out.startswith("alf-lb  language  2025  A Theoretical Framework")
    print_papers("alf-lb")
    card = capsys.readouterr().out
    assert "Han, Zhong, 2025, arXiv 2512.03915" in card
    assert "coterie reproduce alf-lb" in card
    with pytest.raises(ValueError, match="no paper 'alf-bl'; did you mean alf-lb"):
        print_papers("alf-bl")


def test_cards_are_read_without_importing_their_files():
    code = (
        "import sys\n"
        "from coterie.reproduce import search\n"
        "assert len(search()) > 0\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_card_is_complete_and_named_like_its_file():
    for slug, file in find_papers().items():
        card = read_card(file)
        assert card.slug == slug == file.stem.replace("_", "-")
        assert all(
            (card.title, card.authors, card.venue, card.area, card.methods, card.problem, card.headline)
        )
    assert search("no such words") == []


def test_a_card_that_is_not_literal_is_refused_with_its_line(tmp_path):
    (tmp_path / "paper.py").write_text("import math\n\nCARD = Card(slug=str(1))\n")
    with pytest.raises(ValueError, match=r"paper.py, line 3: CARD should be Card\(...\) of literals"):
        read_card(tmp_path / "paper.py")
    (tmp_path / "other.py").write_text("CARD = 3\n")
    with pytest.raises(ValueError, match=r"other.py assigns no CARD"):
        read_card(tmp_path / "other.py")


def test_reproduce_prints_arms_claims_and_where_the_report_is(coterie):
    status, out, err = coterie("reproduce", "toy", "--first-seed", 1, "--out", "runs")
    assert status == 0
    assert "x     6.00 ± 2.00  3.00 ± 1.00" in out
    assert "b is at most 0.6 of a" in out
    assert "3 of 4 claims hold, 1 was not tested." in out
    assert Path("runs/toy.html").exists()
    assert "toy: b, seed 3" in err
    assert "(6/6)" in err


def test_json_is_all_there_is_on_standard_output(coterie):
    status, out, _ = coterie("reproduce", "toy", "--seeds", 2, "--json")
    assert status == 1  # a is below 3 on seed 0
    printed = json.loads(out)
    assert list(printed) == ["slug", "claims", "arms"]
    assert printed["claims"][0] == {
        "text": "b is at most 0.6 of a",
        "verdict": "holds",
        "measured": 0.5,
        "required": "≤ 0.6",
    }
    assert printed["claims"][1]["verdict"] == "does not hold"
    assert printed["arms"]["a"]["x"] == {"mean": 3.0, "sd": pytest.approx(2**0.5), "seeds": [2.0, 4.0]}


def test_all_runs_every_paper(coterie):
    status, out, _ = coterie("reproduce", "--all", "--budget", "smoke", "--json")
    assert status == 0
    assert [summary["slug"] for summary in json.loads(out)] == ["toy"]


@pytest.fixture
def without_scikit_learn(monkeypatch, paper):
    """As where the extra is not installed, with a paper that needs it before the toy."""
    from coterie.reproduce import home_mtl

    files = {"home-mtl": Path(home_mtl.__file__), "toy": Path(toy.__file__)}
    monkeypatch.setattr(experiment, "find_papers", lambda: files)
    load = experiment.load
    monkeypatch.setattr(running, "load", lambda slug: paper if slug == "toy" else load(slug))
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    for module in ("coterie.reproduce.home_mtl", "coterie.recsys.home_mtl", "coterie.models.estimator"):
        monkeypatch.delitem(sys.modules, module)


def test_all_leaves_out_a_paper_whose_extra_is_missing_and_exits_with_1(coterie, without_scikit_learn):
    status, out, err = coterie("reproduce", "--all", "--budget", "smoke")
    assert status == 1
    assert "of 4 claims" in out
    assert Path("coterie-reproduce/toy.html").exists()
    reason = "coterie's estimators need scikit-learn; install it with: pip install 'coterie[tables]'"
    assert f"coterie: home-mtl was not run: {reason}\n" in err
    assert err.endswith("coterie: 1 of 2 papers were not run: home-mtl\n")
    _, out, _ = coterie("reproduce", "--all", "--budget", "smoke", "--json")
    ran, left_out = json.loads(out)
    assert ran["slug"] == "toy"
    assert left_out == {"slug": "home-mtl", "not run": reason}


def test_one_paper_whose_extra_is_missing_is_bad_input(coterie, without_scikit_learn):
    status, out, err = coterie("reproduce", "home-mtl", "--budget", "smoke")
    assert (status, out) == (2, "")
    assert (
        err
        == "coterie: coterie's estimators need scikit-learn; install it with: pip install 'coterie[tables]'\n"
    )


def test_all_does_not_hide_a_missing_module_that_is_no_extra(coterie, monkeypatch):
    def gone(slug):
        raise ModuleNotFoundError("No module named 'coterie.gone'")

    monkeypatch.setattr(running, "load", gone)
    monkeypatch.setattr(sys, "argv", ["coterie", "reproduce", "--all"])
    with pytest.raises(ModuleNotFoundError, match=r"coterie\.gone"):
        cli.main()


def test_an_interrupted_run_exits_with_130_and_says_how_to_go_on(coterie, monkeypatch):
    monkeypatch.setenv("INTERRUPT", "b 0")
    status, out, err = coterie("reproduce", "toy")
    assert (status, out) == (130, "")
    assert "coterie: interrupted; the same command goes on with what is left" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tyo"], "no paper 'tyo'; did you mean toy?"),
        (["toy", "--arms", "a,c"], "no arm of toy 'c'"),
        (["toy", "--seeds", "0"], "seeds=0"),
        (["toy", "--budget", "big"], "no budget 'big'; use one of smoke, standard, full"),
        (["toy", "--data", "words.txt"], "could not convert string to float"),
        (["toy", "--data", "nowhere"], "nowhere does not exist"),
        (["toy", "--all"], "give one paper's slug, or --all"),
        ([], "give one paper's slug, or --all"),
        (["--all", "--arms", "a"], "--data and --arms belong to one paper"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_leaves_nothing(coterie, arguments, message):
    Path("words.txt").write_text("no number")
    status, out, err = coterie("reproduce", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert [p.name for p in Path().iterdir()] == ["words.txt"]


def test_ctrl_c_keeps_what_was_finished(tmp_path):
    process = subprocess.Popen(
        [COTERIE, "reproduce", "alf-lb", "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    first = process.stderr.readline()
    os.kill(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert "(1/39" in first
    assert process.returncode == 130
    assert rest.endswith("the same command goes on with what is left\n")
    assert "Traceback" not in rest
    kept = tmp_path / "alf-lb" / "standard" / "fixed" / "sign-1e-3" / "seed-0.json"
    assert json.loads(kept.read_text())["values"]["moves to a busier expert"] == 0
