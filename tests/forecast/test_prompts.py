import numpy as np
import pytest
import torch
from forecasts import save_language_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from coterie.forecast.backbone import load_backbone, tiny_backbone
from coterie.forecast.prompts import CacheMismatchError, PromptEncoder, statistics, write_prompts


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
def test_statistics_are_those_of_numpy(values):
    segment = np.array(values)
    expected = [segment.mean(), segment.std(), segment[-1] - segment[0]]
    found = statistics(torch.tensor(values, dtype=torch.float64).unsqueeze(0))[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_a_prompt_says_time_mean_deviation_and_change():
    times = np.array([["2016-07-01T00:00:00", "2016-07-01T23:00:00"]], "datetime64[s]")
    [text] = write_prompts(torch.tensor([[0.1234, 1.0, -2.5]]), times)
    assert text.splitlines() == [
        "The time series runs from 2016-07-01 00:00:00 to 2016-07-01 23:00:00.",
        "Its mean is 0.1234.",
        "Its standard deviation is 1.0000.",
        "Its change from first to last is -2.5000.",
    ]


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_prompts_vector_does_not_depend_on_the_others_of_its_batch(tmp_path, pool):
    encoder = PromptEncoder(load_backbone(save_language_model(tmp_path)), pool=pool)
    segments = torch.tensor([[1.0, 2.0], [-300.0, 900.0], [1.0, 2.0]])
    together = encoder(segments)
    torch.testing.assert_close(together[1], encoder(segments[1:2])[0])
    torch.testing.assert_close(together[0], together[2])
    states, mask = encoder.backbone.states(write_prompts(statistics(segments[:2]), None))
    rows = [state[shown] for state, shown in zip(states, mask, strict=True)]
    expected = [row[-1] if pool == "last" else row.mean(0) for row in rows]
    torch.testing.assert_close(together[:2], torch.stack(expected))


def test_a_cache_is_used_for_the_same_series_only(tmp_path):
    encoder = PromptEncoder(tiny_backbone(steps=1), cache=tmp_path)
    values, starts = torch.randn(60), torch.tensor([0, 5, 48])
    first = encoder.series(values, starts, 12, name="load")
    [file] = tmp_path.iterdir()
    marked = load_file(file)["prompts"] + 1
    save_file(
        {"prompts": marked}, file, metadata={"digest": encoder.backbone.digest, "backbone": "tiny"}
    )  # what comes back now was read, not computed
    torch.testing.assert_close(encoder.series(values, starts, 12, name="load"), marked)
    changed = values.clone()
    changed[3] += 1
    others = [
        encoder.series(changed, starts, 12, name="load"),
        encoder.series(values, starts[:2], 12, name="load"),
        encoder.series(values, starts, 10, name="load"),
        encoder.series(values, starts, 12, np.arange(60).astype("datetime64[s]"), name="load"),
        PromptEncoder(tiny_backbone(steps=2), cache=tmp_path).series(values, starts, 12, name="load"),
    ]
    assert len(list(tmp_path.iterdir())) == 1 + len(others)
    torch.testing.assert_close(others[0][1], first[1])
    assert not torch.equal(others[0][0], first[0])


def test_a_cache_file_of_another_backbone_is_refused(tmp_path):
    encoder = PromptEncoder(tiny_backbone(steps=1), cache=tmp_path)
    values, starts = torch.randn(60), torch.tensor([0, 5])
    encoder.series(values, starts, 12)
    [file] = tmp_path.iterdir()
    save_file({"prompts": torch.zeros(2, 2048)}, file, metadata={"backbone": "llama", "digest": "0"})
    with pytest.raises(CacheMismatchError, match=r"\[2, 2048\] of backbone 'llama'; should be \[2, 64\]"):
        encoder.series(values, starts, 12)


def test_a_segment_that_ends_after_the_series_is_refused():
    with pytest.raises(ValueError, match="segment from step 50 of 12 steps ends after the series"):
        PromptEncoder(tiny_backbone(steps=1)).series(torch.randn(60), torch.tensor([50]), 12)


def test_prompts_of_times_need_times():
    with pytest.raises(ValueError, match="the series has no times"):
        PromptEncoder(tiny_backbone(steps=1), prompt="time")(torch.randn(2, 12))
