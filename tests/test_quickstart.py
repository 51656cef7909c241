import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coterie.models import load_pretrained
from coterie.quickstart import BATCH_SIZE, DENSE, MOE, SEQ_LEN, Decoder, quickstart

COTERIE = str(Path(sys.executable).with_name("coterie"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Three small files of different kinds, one with bytes that are no UTF-8 and hostile HTML."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "code.py").write_text("def double(x):\n    return 2 * x\n\n" * 400)
    (folder / "prose.txt").write_text(
        "The cat sat on the mat, and <script>alert(1)</script> was read. " * 300
    )
    (folder / "bytes.md").write_bytes(b"na\xefve caf\xe9 \xff\xfe " * 400)
    return folder


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return quickstart([text], out, steps=4, progress=False), out


def test_both_models_have_the_same_active_parameters_and_tokens(finished):
    report, _ = finished
    dense, moe = report.arms
    assert dense.tokens == moe.tokens == 4 * BATCH_SIZE * SEQ_LEN
    assert moe.active_parameters <= dense.active_parameters <= 1.01 * moe.active_parameters
    assert moe.total_parameters > 2 * dense.total_parameters
    torch.manual_seed(0)
    assert Decoder(MOE).num_parameters() == moe.total_parameters
    assert Decoder(DENSE).num_parameters() == dense.total_parameters


def test_the_run_leaves_a_report_results_and_checkpoints_and_nothing_else(finished):
    report, out = finished
    assert sorted(p.name for p in out.iterdir()) == [
        "dense",
        "moe",
        "plan.json",
        "report.html",
        "results.json",
    ]
    results = json.loads((out / "results.json").read_text())
    assert results["headline"] == report.headline
    assert [arm["label"] for arm in results["arms"]] == ["dense", "MoE"]
    page = (out / "report.html").read_text()
    assert report.headline.replace("held-out", "held‑out") in page  # a hyphen that does not break
    assert "<script>alert(1)" not in page


def test_transformers_loads_the_checkpoints_and_generates_from_them(finished):
    _, out = finished
    for kind in ("moe", "dense"):
        tokenizer = AutoTokenizer.from_pretrained(out / kind)
        theirs = AutoModelForCausalLM.from_pretrained(out / kind, dtype="float32").eval()
        inputs = tokenizer("The cat", return_tensors="pt")
        torch.testing.assert_close(
            theirs(**inputs).logits, load_pretrained(out / kind)(inputs["input_ids"])[0], atol=1e-5, rtol=0
        )
        longer = theirs.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert tokenizer.decode(longer[0]).startswith("The cat")


def test_held_out_loss_is_that_of_the_saved_model(finished, text):
    from coterie.quickstart import Plan, _corpora
    from coterie.recipe.measure import HELDOUT_WINDOWS, sample

    report, out = finished
    _, heldout = _corpora(Plan([str(text)], 0, 4))
    model, total, count = load_pretrained(out / "moe"), 0.0, 0
    some = sample(heldout, HELDOUT_WINDOWS)
    for i in range(len(some)):
        logits = model(some[i][None, :-1])[0][0].double()
        total += torch.nn.functional.cross_entropy(logits, some[i][1:], reduction="sum").item()
        count += len(some[i]) - 1
    assert report.arms[1].held_out == pytest.approx(total / count / 0.6931471805599453, rel=1e-4)


def test_the_same_seed_gives_the_same_numbers(finished, text, tmp_path):
    again = quickstart([text], tmp_path / "run", steps=4, progress=False)
    for one, two in zip(finished[0].arms, again.arms, strict=True):
        assert (one.train, one.held_out, one.entropy) == (two.train, two.held_out, two.entropy)


def test_an_interrupted_run_resumes_to_the_numbers_of_an_unbroken_one(finished, text, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from coterie import quickstart as q\n"
        "fit = q.fit\n"
        "class Stop:\n"
        "    def on_step(self, run):\n"
        "        if run.step == 2: os.kill(os.getpid(), signal.SIGINT)\n"
        "q.fit = lambda *a, **k: fit(*a, callbacks=[Stop()], **k)\n"
        f"assert q.quickstart([{str(text)!r}], {str(tmp_path / 'run')!r}, steps=4, progress=False) is None\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    with pytest.raises(ValueError, match="holds an unfinished run; go on with --resume"):
        quickstart([text], tmp_path / "run", steps=4)
    report = quickstart([], tmp_path / "run", resume=True, progress=False)
    assert report.arms[0].train == finished[0].arms[0].train
    assert report.arms[1].held_out == finished[0].arms[1].held_out


def test_minutes_choose_the_same_number_of_steps_for_both(text, tmp_path):
    report = quickstart([text], tmp_path / "run", minutes=0.01, progress=False)
    assert report.arms[0].tokens == report.arms[1].tokens >= 20 * BATCH_SIZE * SEQ_LEN


def run(*arguments, **options):
    return subprocess.run(
        [COTERIE, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


def test_the_command_prints_the_table_or_only_json(text, tmp_path):
    shown = run("quickstart", "--text", text, "--out", tmp_path / "a", "--steps", 2)
    assert shown.returncode == 0, shown.stderr
    assert "held-out bits per byte" in shown.stdout
    assert "report.html" in shown.stdout
    as_json = run("quickstart", "--text", text, "--out", tmp_path / "b", "--steps", 2, "--json")
    assert json.loads(as_json.stdout)["columns"] == ["", "dense", "MoE"]


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(text, tmp_path):
    process = subprocess.Popen(
        [COTERIE, "quickstart", "--text", text, "--out", tmp_path / "run", "--steps", "400"],
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "step" in line:
            break
    os.kill(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"coterie quickstart --resume --out {tmp_path / 'run'}" in rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--text", "empty.txt"], "empty.txt is empty"),
        (["--text", "short.txt"], "are needed for one batch"),
        (["--out", "other"], "other holds something that is no quickstart"),
        (["--out", "short.txt"], "short.txt holds something that is no quickstart"),
        (["--steps", "0"], "steps=0; should be more than 0"),
        (["--minutes", "-1"], "minutes=-1.0; should be more than 0"),
        (["--minutes", "1", "--steps", "2"], "give steps or minutes, not both"),
        (["--resume", "--out", "nothing"], "nothing holds no unfinished run to resume"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_leaves_nothing(arguments, message, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    done = run("quickstart", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
