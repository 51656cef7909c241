import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import toy

from coterie.reproduce.run import reproduce

pytest.importorskip("mkdocs")


@pytest.fixture
def pages(tmp_path, monkeypatch, paper):
    """The hook of the docs, with the toy paper and a folder of results of its own."""
    file = Path(__file__).parents[2] / "docs" / "build_papers.py"
    spec = importlib.util.spec_from_file_location("build_papers", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "load", lambda slug: paper)
    return module


def test_a_page_shows_the_committed_run_as_it_was(pages, paper, tmp_path):
    reproduce(paper, out=tmp_path, progress=False)
    page = pages.paper_page(pages.escaped(toy.CARD))
    assert page.startswith("# On &lt;Toys&gt;\n\nDoe, 2024, Nowhere\n")
    assert "2 of 4 claims hold, 1 does not, 1 was not tested." in page
    assert "| a is at least 3 on every seed | does not hold | 2 | ≥ 3 |" in page
    assert "*a is at least 3 on every seed*: tried" in page
    assert "| x | 4.00 ± 2.00 | 2.00 ± 1.00 |" in page
    assert page.count("<svg") == 1
    assert "`coterie reproduce toy --budget standard --seeds 3 --first-seed 0`" in page
    assert "have changed" not in page
    assert "| [toy](toy.md) | On <Toys> (2024) | language | 2 of 4" in pages.index_page([toy.CARD])


def test_a_page_says_when_its_claims_were_judged_by_other_margins(pages, paper, tmp_path):
    eased = [replace(paper.claims[0], at_most=0.9), *paper.claims[1:]]
    reproduce(replace(paper, claims=eased), out=tmp_path, progress=False)
    assert "The claims have changed since this run." in pages.paper_page(toy.CARD)


def test_a_paper_that_was_not_run_says_so(pages):
    assert "No standard run is committed yet." in pages.paper_page(toy.CARD)
    assert "not run yet" in pages.index_page([toy.CARD])


def test_the_section_of_papers_lists_them_all(pages):
    class Config:
        nav = [{"What it is": "index.md"}, {"Papers": "papers/index.md"}]  # noqa: RUF012

    section = pages.on_config(Config()).nav[1]["Papers"]
    assert section[0] == {"All papers": "papers/index.md"}
    assert {"alf-lb": "papers/alf-lb.md"} in section
