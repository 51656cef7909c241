"""coterie calib: the file that a checkpoint writes, and what other commands make of it."""

import json

import pytest

from coterie.hf import find_moe_blocks, load
from coterie.shrink import balance_sigma, expert_usage
from coterie.shrink.calibrate import batches


@pytest.mark.filterwarnings("ignore::UserWarning")  # tiny text: some experts see no token
@pytest.mark.parametrize("method", ["ebss", "self"])
def test_what_it_writes_calibrates_and_is_what_it_reports(coterie, checkpoint, tmp_path, method):
    file = tmp_path / "own.jsonl"
    arguments = ["--out", file, "--n", 10, "--length", 32, "--method", method]
    status, printed, err = coterie("calib", checkpoint, *arguments, "--json")
    assert status == 0, err
    assert "[2/2] 10 of 10 sentences" in err
    written = json.loads(printed)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(row["input_ids"]) for row in rows] == [32] * 10
    assert all(row["input_ids"][0] < 256 for row in rows), "no special token begins a sentence"
    assert all(isinstance(row["text"], str) for row in rows)
    model = load(checkpoint)
    usage = expert_usage(model, batches([row["input_ids"] for row in rows]))
    assert written["sigma"] == pytest.approx(balance_sigma(usage).item())
    assert written["experts"] == sum(block.num_experts for block in find_moe_blocks(model))
    assert (written["sentences"], written["tokens"]) == (10, 320)
    options = ["--bits", 3, "--method", "moequant", "--calib", file, "--dry-run", "--json"]
    status, printed, err = coterie("quantize", checkpoint, *options)
    assert status == 0, err
    assert json.loads(printed)["calibration_tokens"] == 288


def test_the_table_says_how_even_the_text_is(coterie, checkpoint, tmp_path):
    arguments = ["--out", tmp_path / "own.jsonl", "--n", 2, "--length", 8]
    status, printed, _ = coterie("calib", checkpoint, *arguments)
    assert status == 0
    for row in (
        "Written by the model, ebss",
        "sigma",
        "nats per token",
        "no token reached",
        "--calib reads it",
    ):
        assert row in printed


def test_bad_wishes_are_refused_in_one_line_before_weights_are_read(
    coterie, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr("coterie.shrink.self_calibration.load", lambda *args, **options: pytest.fail("read"))
    (tmp_path / "taken.jsonl").write_text("")
    for options, message in [
        (["--out", tmp_path / "taken.jsonl"], "taken.jsonl exists already"),
        (["--out", tmp_path / "own.txt"], "own.txt is no .jsonl file"),
        (["--out", tmp_path / "own.jsonl", "--method", "magic"], "no method 'magic'; use one of ebss, self"),
        (["--out", tmp_path / "own.jsonl", "--length", 512], "the model has positions for 64"),
        (["--out", tmp_path / "own.jsonl", "--length", 8, "--first", "eos"], "first_token='eos'"),
        (["--out", tmp_path / "own.jsonl", "--n", 0], "use n ≥ 1"),
        (["--out", tmp_path / "taken.jsonl" / "own.jsonl"], "taken.jsonl is a file"),
    ]:
        status, printed, err = coterie("calib", checkpoint, *options)
        assert (status, printed) == (2, "")
        assert message in err
        assert not (tmp_path / "own.jsonl").exists()


def test_interrupted_it_writes_nothing(coterie, checkpoint, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("coterie.shrink.self_calibration.ebss", interrupt)
    status, _, err = coterie("calib", checkpoint, "--out", tmp_path / "own.jsonl", "--n", 2, "--length", 8)
    assert status == 130
    assert "interrupted; nothing was written" in err
    assert list(tmp_path.iterdir()) == []
