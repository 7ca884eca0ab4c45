"""Ranking losses under Gumbel noise: the average over orders of a noisy list."""

import jax
import numpy as np
import pytest

from paxo.losses.gumbel import SAMPLES, gumbel_loss
from paxo.losses.learning_to_rank import approx_ndcg_loss
from paxo.losses.lipo import lipo_loss

RNG = np.random.default_rng(0)
POLICY, REFERENCE = RNG.uniform(-8, -4, (2, 3, 4)).astype(np.float32)
GRADES = np.tile(np.array([1.0, 0.0, 0.5, 0.25], np.float32), (3, 1))
KEY = jax.random.key(0)


@pytest.mark.parametrize("form", ["list_mle", "pair_logistic", "approx_ndcg"])
def test_it_is_the_mean_of_the_loss_over_noisy_scores(form):
    noise = np.asarray(jax.random.gumbel(KEY, (SAMPLES, 3, 4)))
    scores = 0.5 * (POLICY - REFERENCE) + 0.3 * noise
    zero, settings = np.zeros_like(POLICY), {"beta": 1.0}
    plain = approx_ndcg_loss if form == "approx_ndcg" else lipo_loss
    if plain is lipo_loss:
        settings["ranking_loss"] = form
    values = [plain(s, zero, GRADES, **settings).value for s in scores.astype(np.float32)]
    found = gumbel_loss(POLICY, REFERENCE, GRADES, ranking_loss=form, beta=0.5, noise=0.3, key=KEY)
    np.testing.assert_allclose(found.value, np.mean(values), rtol=1e-5)


def test_noise_that_vanishes_leaves_the_loss():
    found = gumbel_loss(POLICY, REFERENCE, GRADES, noise=1e-7, beta=0.5, key=KEY)
    plain = lipo_loss(POLICY, REFERENCE, GRADES, ranking_loss="list_mle", beta=0.5)
    np.testing.assert_allclose(found.value, plain.value, rtol=1e-5)
