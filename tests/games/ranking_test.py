"""What a judge who only ranks says about a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.games.ranking import rank_gradient


def ranked(key, slope, total=10, named=4):
    """An estimate from standard normal perturbations, ranked by a function of this slope."""
    tried = jax.random.normal(key, (total, len(slope)))
    best = jnp.argsort(tried @ slope)[:named]
    return rank_gradient(tried, best), tried, best


def test_it_is_the_mean_difference_over_the_ordered_pairs():
    found, tried, best = ranked(jax.random.key(0), jnp.array([1.0, -2.0, 0.5]))
    order = [*np.asarray(best), *sorted(set(range(10)) - set(np.asarray(best).tolist()))]
    pairs = [(i, j) for a, i in enumerate(order[:4]) for j in order[a + 1 :]]
    assert len(pairs) == 4 * 6 + 6
    expected = np.mean([np.asarray(tried[j] - tried[i]) for i, j in pairs], 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    moved = rank_gradient(tried + 3.0, best)  # what is common to all cancels
    np.testing.assert_allclose(moved, found, atol=1e-5)


def test_ten_ranked_perturbations_tell_half_of_a_gradient_in_twenty_dimensions():
    # Published: cosines .495 and, with the weights of the authors' code, .493.
    slope = jnp.zeros(20).at[0].set(1.0)

    @jax.jit
    @jax.vmap
    def cosines(key):
        ours, tried, best = ranked(key, slope)
        theirs = 30 * ours - tried[best].sum(0)  # one win too many for each that is named
        return jnp.stack([x @ slope / jnp.linalg.norm(x) for x in (ours, theirs)])

    ours, theirs = np.asarray(cosines(jax.random.split(jax.random.key(1), 20000))).mean(0)
    assert ours == pytest.approx(0.495, abs=0.005)
    assert theirs == pytest.approx(0.493, abs=0.005)
    assert theirs < ours - 0.0005


def test_steps_against_it_go_down_a_quadratic():
    def step(x, key):
        direction, *_ = ranked(key, x)
        return x - 0.2 * jnp.linalg.norm(x) * direction / jnp.linalg.norm(direction), None

    start = jnp.ones(6)
    last, _ = jax.jit(lambda x: jax.lax.scan(step, x, jax.random.split(jax.random.key(2), 100)))(
        start
    )
    assert float(last @ last) < 1e-2


def test_indices_must_fit():
    with pytest.raises(ValueError, match="1 to 3 of the perturbations; got 4"):
        rank_gradient(jnp.zeros((3, 2)), jnp.arange(4))
