"""The code in the documentation runs, page by page, top to bottom."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    DOCS.parent / "README.md",
    # the paper on that page is run by tests/reproduce/test_adding_a_paper.py
    *(page for page in sorted(DOCS.glob("*.md")) if page.stem != "adding-a-paper"),
    *sorted(DOCS.glob("estimators/*.md")),
]
BLOCK = re.compile(r"```python\n(.*?)```", re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text()):
        if not block.startswith("# skip:"):
            exec(compile(block, str(page), "exec"), scope)


def test_every_public_name_is_in_the_reference():
    import coterie.data
    import coterie.finance
    import coterie.forecast
    import coterie.hf
    import coterie.longitudinal
    import coterie.models
    import coterie.nn
    import coterie.recsys
    import coterie.shrink
    import coterie.stream
    import coterie.tabular
    import coterie.train
    import coterie.tune

    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    protocols_and_types = {"AnyRouter", "Experts", "Cache", "Span", "Callback", "Run", "LossFn"}
    for room in (
        coterie.nn,
        coterie.models,
        coterie.train,
        coterie.data,
        coterie.hf,
        coterie.shrink,
        coterie.tabular,
        coterie.recsys,
        coterie.stream,
        coterie.finance,
        coterie.forecast,
        coterie.longitudinal,
        coterie.tune,
    ):
        for name in set(room.__all__) - protocols_and_types:
            if name[0].isupper() and not name.isupper():
                found = f".{name}\n" in text or re.search(rf"members: \[[^]]*\b{name}\b", text)
                assert found, f"{room.__name__}.{name} is missing from docs/reference"
