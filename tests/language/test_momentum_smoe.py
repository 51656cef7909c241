import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from coterie.language.momentum_smoe import make_ffn, make_residual, with_momentum
from coterie.models import Cache, Decoder, DecoderConfig, generate, save_pretrained
from coterie.nn import AdamResidual, MoE, MomentumResidual, PlainResidual, SwiGLU

CONFIG = DecoderConfig(
    37, dim=16, layers=4, heads=2, kv_heads=1, head_dim=8, hidden=24, num_experts=4, expert_hidden=8
)
KINDS = ["smoe", "momentum", "adam", "robust", ["adam", "momentum", "smoe", "robust"]]
IDS = torch.randint(37, (2, 12), generator=torch.Generator().manual_seed(1))


def decoder(kinds, **options):
    torch.manual_seed(0)
    return Decoder(CONFIG, make_ffn(CONFIG), make_residual(CONFIG.layers, kinds, **options)).eval()


def test_the_first_layer_is_adams_and_the_others_heavy_ball():
    kinds = [type(layer.residual) for layer in decoder("adam").layers]
    assert kinds == [AdamResidual, MomentumResidual, MomentumResidual, MomentumResidual]


def test_the_stream_is_the_papers_recurrence():
    model, seen, updates = decoder("momentum", mu=0.6, gamma=0.4), [], []
    for layer in model.layers:
        layer.self_attn.register_forward_hook(lambda *args: updates.append(args[2][0]))
        layer.mlp.register_forward_hook(lambda *args: updates.append(args[2][0]))
    model.norm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(IDS)
    x, p = model.embed_tokens(IDS), 0.0
    for attended, mixed in zip(updates[::2], updates[1::2], strict=True):
        p = 0.6 * p + mixed
        x = x + attended + 0.4 * p
    torch.testing.assert_close(seen[0], x)


def test_no_momentum_is_the_decoder_without_bit_for_bit_and_by_name():
    plain = Decoder(CONFIG, make_ffn(CONFIG)).eval()
    same = Decoder(CONFIG, make_ffn(CONFIG), make_residual(4, "momentum", mu=0.0)).eval()
    assert list(same.state_dict()) == list(plain.state_dict())
    assert not any("residual" in name for name in plain.state_dict())
    same.load_state_dict(plain.state_dict())
    assert torch.equal(same(IDS)[0], plain(IDS)[0])


@pytest.mark.parametrize("kinds", KINDS)
def test_decoding_with_a_cache_is_decoding_without(kinds):
    model, cache = decoder(kinds), Cache(4)
    pieces = [model(IDS[:, a:b], cache=cache)[0] for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1), model(IDS)[0], atol=1e-5, rtol=1e-4)
    tokens, slow = torch.stack(list(generate(model, IDS[:, :4], 5)), 1), IDS[:, :4]
    for _ in range(5):
        slow = torch.cat([slow, model(slow)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert tokens.tolist() == slow[:, 4:].tolist()


@pytest.mark.parametrize("kinds", KINDS)
def test_activation_checkpointing_carries_the_state_and_its_gradient(kinds):
    gradients = {}
    for recompute in (False, True):
        model = decoder(kinds, learnable=True).train()
        if recompute:
            for layer in model.layers:
                layer.forward = lambda *args, inner=layer.forward: checkpoint(
                    inner, *args, use_reentrant=False
                )
        F.cross_entropy(model(IDS[:, :-1])[0].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        gradients[recompute] = {name: p.grad for name, p in model.named_parameters()}
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient)


def test_an_early_expert_feels_the_later_layers_through_the_momentum():
    model = decoder("momentum", mu=0.9, gamma=0.5)
    seen = []
    model.layers[0].mlp.register_forward_hook(
        lambda *args: args[2][0].retain_grad() or seen.append(args[2][0])
    )
    model.norm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for layer in model.layers[1:]:  # nothing but the momentum is left of the later layers
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        for p in layer.mlp.experts.parameters():
            nn.init.zeros_(p)
    model(IDS)
    seen[1].sum().backward()
    torch.testing.assert_close(seen[0].grad, torch.full_like(seen[0], 0.5 * (1 + 0.9 + 0.81 + 0.729)))


@pytest.mark.parametrize("kinds", KINDS)
def test_padding_changes_nothing_for_real_tokens(kinds):
    model, mask = decoder(kinds), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    padded, _ = model(IDS, mask=mask)
    torch.testing.assert_close(padded[1, :7], model(IDS[1:, :7])[0][0], atol=1e-5, rtol=1e-4)
    assert bool(padded.isfinite().all())


def test_dense_layers_between_hand_the_momentum_on():
    residual = make_residual(4, ["momentum", "smoe", "momentum", "smoe"])
    model, states = Decoder(CONFIG, make_ffn(CONFIG, every=2), residual), []
    assert [type(layer.mlp) for layer in model.layers] == [MoE, SwiGLU, MoE, SwiGLU]
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, output: states.append((args[4], output[2])))
    _, routings = model(IDS)
    assert len(routings) == 2
    assert states[1][0] is states[1][1]
    assert states[0][0] is None
    assert not torch.equal(states[2][1].momentum, states[2][0].momentum)


@pytest.mark.parametrize("kinds", KINDS)
def test_the_decoder_learns_with_it(kinds):
    model = decoder(kinds, gamma=0.5, learnable=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = torch.arange(24).remainder(7).expand(4, -1)
    losses = []
    for _ in range(30):
        logits, _ = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_momentum_can_be_given_to_a_trained_decoder_and_keeps_the_sign_of_its_experts():
    plain = decoder("smoe")
    before = plain(IDS)[0]
    assert with_momentum(plain, mu=0.0, gamma=1.0) is plain
    assert torch.equal(plain(IDS)[0], before)
    with_momentum(plain, mu=0.5, gamma=0.5, layers=[2])
    assert [layer.residual.mu for layer in plain.layers] == [0.0, 0.0, 0.5, 0.0]


def test_a_decoder_with_momentum_is_not_written_as_one_without(tmp_path):
    model = Decoder(CONFIG, None, make_residual(4, ["smoe", "momentum", "smoe", "smoe"]))
    with pytest.raises(ValueError, match=r"layer 1 cannot be written as Qwen3.* found MomentumResidual"):
        save_pretrained(model, tmp_path / "model")
    model.layers[1].residual = PlainResidual()
    save_pretrained(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_residual(4, "sgd"), "kind='sgd' is not known; use one of smoe, momentum, adam, robust"),
        (lambda: make_residual(4, ["momentum"] * 3), "3 kinds for 4 layers"),
        (lambda: make_residual(4, mu=1.0), "mu=1.0"),
        (lambda: make_residual(4, "adam", adam_gamma=0.0), "gamma=0.0"),
        (lambda: make_ffn(CONFIG, every=0), "every=0"),
        (lambda: with_momentum(decoder("smoe"), layers=[4]), r"layers=\[4\]; the decoder has layers 0 to 3"),
        (lambda: with_momentum(Decoder(CONFIG, lambda layer: SwiGLU(16, 8))), r"layers=\[\]"),
    ],
)
def test_what_cannot_be_built_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
