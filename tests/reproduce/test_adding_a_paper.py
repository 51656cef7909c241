import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import coterie.reproduce
from coterie.reproduce.experiment import experiment_of, read_card
from coterie.reproduce.run import reproduce

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_on_adding_a_paper_is_a_paper(tmp_path):
    page = (DOCS / "adding-a-paper.md").read_text("utf-8")
    (tmp_path / "loss_free.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    done = subprocess.run(
        [sys.executable, "loss_free.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "no token ever moves to an expert that is as busy" in done.stdout
    written = sorted(p.name for p in (tmp_path / "my-papers").iterdir())
    assert written == ["loss-free.html", "loss-free.json"]


def test_the_paper_file_in_the_docstring_runs_as_it_stands(tmp_path):
    docstring = coterie.reproduce.__doc__
    indented = re.search(r"\n\n(    .*?)\n\n(?=\S)", docstring, re.DOTALL)[1]
    file = tmp_path / "fair_coins.py"
    file.write_text(textwrap.dedent(indented))
    module = ModuleType("fair_coins")
    exec(compile(file.read_text(), file, "exec"), vars(module))
    result = reproduce(experiment_of(module), out=tmp_path, progress=False)
    assert read_card(file).slug == result.slug == "fair-coins"
    assert len(result.claims) == 2
    assert result.holds
