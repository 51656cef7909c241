import pytest
import torch
from forecasts import save_language_model
from transformers import BertConfig, BertModel

from coterie.forecast.backbone import load_backbone, read_tiny, tiny_backbone, untrained_tiny


def test_the_tiny_backbone_learns_to_repeat_a_prompt_and_is_the_same_every_time():
    once, again = tiny_backbone.__wrapped__(steps=3), tiny_backbone.__wrapped__(steps=3)
    assert once.digest == again.digest
    assert once.digest != tiny_backbone.__wrapped__(steps=3, seed=1).digest
    assert not any(p.requires_grad for p in once.parameters())


def test_making_it_leaves_torchs_generator_as_it_was():
    before = torch.get_rng_state()
    tiny_backbone.__wrapped__(steps=1)
    untrained_tiny()
    assert torch.equal(before, torch.get_rng_state())


def test_it_reads_close_numbers_alike_and_far_ones_otherwise():
    states, _ = tiny_backbone(steps=1).states([f"Its mean is {m:.4f}." for m in (0.0, 0.4, 4.0)])
    near, far = (states[0, 1] - states[1, 1]).norm(), (states[0, 1] - states[2, 1]).norm()
    assert near < far / 2


def test_numbers_beyond_its_bins_are_those_at_the_end_and_other_words_are_skipped():
    ids = [read_tiny([f"mean {m:.1f}"])[0].tolist() for m in (5.0, 99.0, -99.0)]
    assert ids[0] == ids[1] != ids[2]
    assert read_tiny(["Well, 3.5 sheep! Its mean is 5.0"])[0].tolist() == ids[0]
    hours = [
        read_tiny([f"2020-01-0{day} {hour}:00:00"])[0].tolist()[0] for day, hour in ((1, "00"), (8, "05"))
    ]
    assert [a == b for a, b in zip(*hours, strict=True)] == [True, True, False]  # month, weekday, hour


def test_gradients_pass_through_to_its_inputs_not_to_its_weights():
    backbone = tiny_backbone(steps=1).train()
    x = torch.randn(2, 3, backbone.dim, requires_grad=True)
    backbone(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in backbone.parameters())
    assert not backbone.model.training


def test_a_language_model_in_a_folder_is_read_with_padding_that_changes_nothing(tmp_path):
    backbone = load_backbone(save_language_model(tmp_path))
    assert backbone.dim == 16
    short, long = "Its mean is 1.", "The time series runs from 1 to 2."
    together, mask = backbone.states([short, long])
    alone, _ = backbone.states([short])
    assert mask.sum(1).tolist() == [5, 9]
    torch.testing.assert_close(together[0, :5], alone[0])


def test_what_is_no_causal_language_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder with a config"):
        load_backbone(str(tmp_path / "nowhere"))
    save_language_model(tmp_path)
    BertModel(
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="depend on later tokens"):
        load_backbone(str(tmp_path))
