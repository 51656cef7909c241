import math

import numpy as np
import pytest

from coterie.data.domain_markov import DOMAINS, SYMBOLS, domain_markov, successor_table


def test_steps_follow_the_domains_table_with_the_given_chances():
    ids = domain_markov(4000, seed=1, domain=2).numpy()
    followers = successor_table()[2]
    now, then = ids[:, 1:-1].ravel() - DOMAINS, ids[:, 2:].ravel() - DOMAINS
    shares = (followers[now] == then[:, None]).mean(0)
    wanted = 0.95 * np.array([0.5, 0.25, 0.15, 0.1]) + 0.05 / SYMBOLS
    np.testing.assert_allclose(shares, wanted, atol=0.005)


def test_the_entropy_of_a_step_is_as_documented():
    likely = 0.95 * np.array([0.5, 0.25, 0.15, 0.1]) + 0.05 / SYMBOLS
    rest = (SYMBOLS - 4) * 0.05 / SYMBOLS * math.log(0.05 / SYMBOLS)
    assert -(likely * np.log(likely)).sum() - rest == pytest.approx(1.534, abs=5e-4)


def test_a_mixture_has_every_domain_and_a_seed_gives_the_same_text_again():
    ids = domain_markov(200, seed=3)
    assert set(ids[:, 0].tolist()) == set(range(DOMAINS))
    assert ids[:, 1:].min() >= DOMAINS
    assert ids.max() < DOMAINS + SYMBOLS
    assert (ids == domain_markov(200, seed=3)).all()
    assert (ids != domain_markov(200, seed=4)).any()


def test_domains_and_tables_differ():
    assert (successor_table()[0] != successor_table()[1]).any()
    assert (successor_table(0) != successor_table(1)).any()


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="domain=8; use 0 to 7"):
        domain_markov(1, seed=0, domain=8)
    with pytest.raises(ValueError, match="seq_len=2"):
        domain_markov(1, seed=0, seq_len=2)
