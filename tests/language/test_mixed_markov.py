import torch

from coterie.language.mixed_markov import EASY, FREE, HARD, mixed_markov, scored_loss
from coterie.models import Decoder, DecoderConfig
from coterie.nn.balance import entropy


def test_easy_tokens_follow_from_the_last_and_hard_ones_from_topic_and_two():
    ids, labels = mixed_markov(200, 64, seed=1)
    successor: dict[int, int] = {}
    facts: dict[tuple[int, int, int], list[int]] = {}
    for row, kinds in zip(ids.tolist(), labels.tolist(), strict=True):
        topic = None
        for i, (token, kind) in enumerate(zip(row, kinds, strict=True)):
            topic = token if token >= 28 else topic
            if kind == EASY:
                assert successor.setdefault(row[i - 1], token) == token
            elif kind == HARD:
                facts.setdefault((topic, row[i - 2], row[i - 1]), []).append(token)
    assert sorted(successor.values()) == list(range(16))
    usual = sum(max(map(next_.count, next_)) for next_ in facts.values())
    assert usual / sum(map(len, facts.values())) > 0.9
    assert 0.4 < (labels == EASY).double().mean() / (labels != FREE).double().mean() < 0.6


def test_seeds_change_the_text_and_not_its_rules():
    one, other = mixed_markov(20, 64, seed=1)[0], mixed_markov(20, 64, seed=2)[0]
    assert torch.equal(one, mixed_markov(20, 64, seed=1)[0])
    assert not torch.equal(one, other)


def test_only_what_can_be_foretold_is_scored():
    config = DecoderConfig(
        36, dim=16, layers=2, heads=1, kv_heads=1, head_dim=16, hidden=32, num_experts=4, expert_hidden=8
    )
    model, (ids, labels) = Decoder(config), mixed_markov(3, 32, seed=0)
    output = scored_loss(lambda routings: 2.0 * entropy(routings))(model, (ids, labels))
    logits, routings = model(ids[:, :-1])
    picked = [
        -logits[b, s].log_softmax(-1)[ids[b, s + 1]]
        for b in range(3)
        for s in range(32)
        if labels[b, s + 1] != FREE
    ]
    torch.testing.assert_close(output.cross_entropy, torch.stack(picked).mean().detach())
    torch.testing.assert_close(output.loss, output.cross_entropy + 2.0 * entropy(routings))
    assert output.tokens == len(picked)
