"""Forward passes are held at each layer, do between layers what the model does, and leave nothing behind."""

import threading

import pytest
import torch
from families import tiny_model
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

from coterie.hf import Checkpoint, load, stream_layers, stream_records
from coterie.hf.held import held_passes

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [torch.randint(3, 128, shape, generator=GENERATOR) for shape in ((2, 9), (1, 12))]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path):
    tiny_model("qwen3_moe", "Qwen3MoeExperts").save_pretrained(tmp_path)
    return tmp_path


def decoder(between):
    """A forward of the decoder that computes `between` after each of its layers."""

    def forward(self, input_ids=None, use_cache=None, **kwargs):
        hidden = self.embed_tokens(input_ids)
        position_ids = torch.arange(input_ids.shape[1]).unsqueeze(0)
        rotary = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = between(self, layer(hidden, position_embeddings=rotary))
        return MoeModelOutputWithPast(last_hidden_state=hidden)

    return forward


@torch.no_grad()
def run_held(folder):
    """The last layer's output for each batch, through held passes with all layers loaded."""
    checkpoint = Checkpoint(folder)
    outputs = []
    with held_passes(checkpoint, BATCHES) as passes:
        for name in checkpoint.layers:
            outputs.clear()
            with checkpoint.loaded(name) as layer:
                for one in passes:
                    assert one.layer == name
                    outputs.append(layer(*one.args, **one.kwargs))
                    one.go_on(outputs[-1])
        assert all(one.layer is None for one in passes)
    return outputs


@torch.no_grad()
def test_the_outputs_are_those_of_the_whole_model(folder):
    whole = load(folder)
    for output, ids in zip(run_held(folder), BATCHES, strict=True):
        logits = whole.lm_head(whole.model.norm(output))
        torch.testing.assert_close(logits, whole(ids).logits, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_is_computed_between_layers_may_use_the_decoders_own_weights(folder, monkeypatch):
    between = decoder(lambda model, hidden: hidden + model.norm(hidden))
    monkeypatch.setattr(modeling.Qwen3MoeModel, "forward", between)
    whole = load(folder)
    whole.model.norm.weight.normal_()
    whole.save_pretrained(folder)
    for output, ids in zip(run_held(folder), BATCHES, strict=True):
        expected = whole.model(ids).last_hidden_state
        torch.testing.assert_close(output + whole.model.norm(output), expected, rtol=1e-5, atol=1e-6)


def test_what_is_computed_between_layers_cannot_use_embedding_tables(folder, monkeypatch):
    between = decoder(lambda model, hidden: hidden @ model.embed_tokens.weight.T @ model.embed_tokens.weight)
    monkeypatch.setattr(modeling.Qwen3MoeModel, "forward", between)
    message = (
        r"needs model\.embed_tokens\.weight, which is in none of its layers, before it calls model\.layers\.1"
    )
    with pytest.raises(ValueError, match=message):
        next(stream_records(folder, BATCHES))


def test_layers_out_of_order_are_refused(folder, monkeypatch):
    def forward(self, input_ids=None, use_cache=None, **kwargs):
        self.layers[1](self.embed_tokens(input_ids))

    monkeypatch.setattr(modeling.Qwen3MoeModel, "forward", forward)
    with pytest.raises(ValueError, match=r"calls model\.layers\.1 where model\.layers\.0 is next"):
        next(stream_records(folder, BATCHES))


@pytest.mark.parametrize(
    ("headless", "message"),
    [(True, r"does not call its layer layers\.1,"), (False, r"needs lm_head\.weight, which")],
)
def test_layers_that_are_left_out_are_refused(folder, monkeypatch, headless, message):
    def forward(self, input_ids=None, use_cache=None, **kwargs):
        return MoeModelOutputWithPast(last_hidden_state=self.layers[0](self.embed_tokens(input_ids)))

    if headless:
        load(folder).model.save_pretrained(folder)
    monkeypatch.setattr(modeling.Qwen3MoeModel, "forward", forward)
    monkeypatch.setattr(modeling.Qwen3MoeDecoderLayer, "forward", lambda self, hidden: hidden)
    with pytest.raises(ValueError, match=message):
        next(stream_records(folder, BATCHES))


def test_what_the_model_raises_is_raised_here(folder, monkeypatch):
    def between(model, hidden):
        raise KeyError("between layers")

    monkeypatch.setattr(modeling.Qwen3MoeModel, "forward", decoder(between))
    with pytest.raises(KeyError, match="between layers"):
        next(stream_records(folder, BATCHES))


@pytest.mark.parametrize("stream", [stream_records, stream_layers])
@pytest.mark.parametrize("blocks", [1, 2])
def test_nothing_is_left_of_a_stream_that_ends_early_or_late(folder, stream, blocks):
    before, computing, checkpoint = threading.active_count(), torch.get_num_threads(), Checkpoint(folder)
    found = stream(checkpoint, BATCHES)
    next(found)
    assert threading.active_count() == before + len(BATCHES)
    for _ in range(blocks - 1):
        next(found)
    found.close()
    assert threading.active_count() == before
    assert torch.get_num_threads() == computing
    assert not any("forward" in vars(module) for module in checkpoint.model.modules())
