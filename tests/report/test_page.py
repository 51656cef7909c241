import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reports import arms, random_routing, report_of

from coterie.report import Report, write_report
from coterie.report.page import render
from coterie.report.plots import expert_colours, loss_curves, smooth

HOSTILE = b'</pre></script><script>alert(1)</script><img src="http://evil.example/x" onerror=alert(2)>&amp;'


class Page(HTMLParser):
    """Elements with their attributes, and the text inside each kind of element."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.ids, self.inside = [], [], []
        self.text, self.text_of_passage = {}, ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.inside.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        tag = self.inside[-1][0] if self.inside else ""
        self.text[tag] = self.text.get(tag, "") + data
        if any(attrs.get("id") == "text" for _, attrs in self.inside) and tag == "span":
            self.text_of_passage += data


def test_the_page_refers_to_nothing_outside_itself():
    page = render(report_of(b"def f(x): return x\n" * 10))
    parsed = Page(page)
    assert not parsed.inside
    for tag, attrs in parsed.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#")
        assert attrs.get("xlink:href") is None
    assert not re.search(r"https?://|//\w|@import|@font-face", page.replace("; // a browser", ""))
    assert {a for a in re.findall(r"url\(([^)]*)\)", page) if not a.startswith("#")} == set()
    policy = [a["content"] for t, a in parsed.elements if t == "meta" and "http-equiv" in a]
    assert policy[0].startswith("default-src 'none'")


def test_a_hostile_corpus_stays_text():
    words = HOSTILE.decode()
    hostile = {
        "title": words,
        "prompt": words,
        "sample": words + "\x00\x1b[31m\u202e",
        "provenance": {words: words},
        "columns": ["", words, "MoE"],
        "rows": [[words, words, words]],
        "arms": [arms()[0], arms()[1]],
    }
    hostile["arms"][0].label = hostile["arms"][1].label = words
    plain = Page(render(report_of(b"ab cd " * 12)))
    parsed = Page(render(report_of(HOSTILE, **hostile)))
    assert not parsed.inside
    assert {tag for tag, _ in parsed.elements} == {tag for tag, _ in plain.elements}
    assert sum(tag == "script" for tag, _ in parsed.elements) == 2
    assert not any(name.startswith("on") for _, attrs in parsed.elements for name in attrs)
    assert parsed.text["title"] == words
    assert parsed.text["dt"] == parsed.text["dd"] == words
    assert parsed.text_of_passage == words
    assert not set("\x00\x1b\u202e") & set(render(report_of(HOSTILE, **hostile)))


def test_the_passage_is_in_the_page_as_it_was_read():
    text = "\n\tdéf  f(x):\n\n    return '日本'\n"
    parsed = Page(render(report_of(text.encode())))
    assert parsed.text_of_passage == text


def test_the_page_gives_every_character_its_experts():
    report = report_of(b"a b\n", num_layers=2, used=0.5)
    page = render(report)
    choices = json.loads(re.search(r'id="choices">(.*?)</script>', page)[1])
    assert [[c[::2] for c in layer] for layer in choices] == report.passage.experts
    for layer, weights in zip(choices, report.passage.weights, strict=True):
        for chosen, expected in zip(layer, weights, strict=True):
            assert [w / 1000 for w in chosen[1::2]] == pytest.approx(expected, abs=5e-4)
    passage = page[page.index('<pre id="text"') :]
    classes = re.findall(r'<span class="(e\d+|none)', passage)[:4]
    assert classes == [f"e{e[0]}" if e else "none" for e in report.passage.experts[0]]


@pytest.mark.parametrize("used", [1.0, 0.3, 0.0])
@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 2), (1, 64), (3, 8)])
def test_the_page_fits_any_number_of_layers_and_experts(num_layers, num_experts, used):
    parsed = Page(render(report_of(b"ab cd " * 9, num_layers, num_experts, used)))
    assert not parsed.inside
    buttons = [attrs for tag, attrs in parsed.elements if tag == "button"]
    assert len(buttons) == num_experts
    heat = [attrs for tag, attrs in parsed.elements if tag == "td" and "style" in attrs]
    assert len(heat) == num_layers * num_experts
    choices = [a for t, a in parsed.elements if t == "input" and a["name"] == "passage"]
    assert len(choices) == (num_layers if num_layers > 1 else 0)


def test_parts_without_data_are_left_out():
    report = Report("A run", [arms()[1]], ["", "MoE"], [["bits", "1.8"]])
    report.arms[0].steps = report.arms[0].train = report.arms[0].eval_steps = report.arms[0].eval = []
    parsed = Page(render(report))
    assert not {"pre", "svg", "dl", "button"} & {tag for tag, _ in parsed.elements}


def test_the_page_can_be_read_by_those_who_do_not_see_it():
    parsed = Page(render(report_of(b"ab cd " * 9)))
    assert ("html", {"lang": "en"}) in parsed.elements
    assert parsed.text["title"] == "A run"
    assert [t for t, _ in parsed.elements if re.fullmatch("h[1-6]", t)].count("h1") == 1
    for tag, attrs in parsed.elements:
        if tag == "svg":
            assert attrs["role"] == "img"
            assert "MoE ends at 1.800" in attrs["aria-label"]
        if tag == "section":
            assert any(a.get("id") == attrs["aria-labelledby"] for t, a in parsed.elements if t == "h2")
        if tag == "button":
            assert attrs["aria-label"]
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_same_report_gives_the_same_bytes_in_another_process(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from reports import report_of; from coterie.report import write_report\n"
        "write_report(sys.argv[1], report_of(b'def f(x): return x\\n' * 10))"
    )
    paths = [tmp_path / "a.html", tmp_path / "b.html"]
    for seed, path in enumerate(paths):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_an_error_leaves_nothing_and_keeps_the_page_that_was_there(tmp_path, monkeypatch):
    report = report_of(b"ab cd ")
    path = write_report(tmp_path / "new" / "report.html", report)
    before = path.read_bytes()

    broken = report_of(b"ab cd ", rows=[["too", "short"]])
    with pytest.raises(ValueError, match="2 cells under 3 columns"):
        write_report(tmp_path / "never" / "report.html", broken)
    assert not (tmp_path / "never").exists()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(path, report_of(b"other "))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": [[[]]]}, r"words has \[1\] experts per layer; should be 8 in each of 2 layers"),
        (
            {"load": [[1.0, 1.0]] * 2, "words": [], "bytes": []},
            r"the passage names expert \d; load has only 2",
        ),
        ({"load": [[1.0] * 8], "words": [], "bytes": []}, "the passage has 2 layers; should be 1"),
        ({"arms": []}, "at least one"),
    ],
)
def test_parts_that_disagree_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        render(report_of(b"ab cd ab cd ab cd ab cd", **changes))


def test_json_says_what_the_page_says():
    report = report_of(b"ab cd " * 9)
    content = json.loads(report.to_json())
    assert content["headline"] == report.headline
    assert content["load"] == report.load
    assert content["rows"] == report.rows
    assert content["passage"]["texts"] == report.passage.texts
    assert content["words"][0][0] == [vars(word) for word in report.words[0][0]]


def test_json_refuses_what_json_cannot_say():
    report = report_of(b"ab cd ", load=[[float("nan")] * 8] * 2)
    with pytest.raises(ValueError, match="nan"):
        report.to_json()


def test_curves_need_a_step_for_every_value():
    dense, moe = arms()
    moe.train.append(1.0)
    with pytest.raises(ValueError, match="arm 'MoE' has 61 training values at 60 steps"):
        loss_curves([dense, moe])
    with pytest.raises(ValueError, match="at most 6"):
        loss_curves([dense] * 7)


def test_a_long_curve_makes_no_heavier_page():
    arm = arms()[0]
    arm.steps, arm.train = list(range(20_000)), [2.0 + 1 / (1 + i) for i in range(20_000)]
    assert len(loss_curves([arm])) < 60_000


def test_a_label_is_not_read_as_a_formula():
    dense, moe = arms()
    dense.label = "costs $5 or $6"
    assert "costs $5 or $6" in loss_curves([dense, moe])


def test_one_step_and_one_reading_can_be_drawn():
    arm = arms()[0]
    arm.steps, arm.train, arm.eval_steps, arm.eval = [1], [8.0], [1], [8.0]
    assert loss_curves([arm]).startswith("<svg")


def test_smoothing_keeps_a_straight_line_straight_inside():
    line = [0.5 * i for i in range(300)]
    assert smooth(line)[10:-10] == pytest.approx(line[10:-10])
    assert smooth([]).tolist() == []


def test_experts_have_distinct_colours_on_which_text_can_be_read():
    colours = expert_colours(64)
    assert len(set(colours)) == 64
    assert expert_colours(8) == colours[:8]
    assert min(contrast(colour, "#14161a") for colour in colours) > 4.5  # WCAG AA


def contrast(a, b):
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_reports_can_be_made_without_the_drawing_library_loaded():
    code = "import sys, coterie.report; print({'matplotlib', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_random_routing_is_valid():
    random_routing(20, used=0.5).validate()
