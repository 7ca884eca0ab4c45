import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.sampling import best_of_n, distinct, finish_shares, rejection_sample, take_candidates
from paxo.types import Completions, Finish
from tests.compiling import compilations


def made_completions(b=2, k=3, t=4):
    tokens = jnp.arange(b * k * t, dtype=jnp.int32).reshape(b, k, t)
    logps = -tokens.astype(jnp.float32)
    finish = jnp.array([[0, 1, 2], [0, 0, 0]], jnp.int32)
    return Completions(tokens, tokens >= 0, logps, finish, {"policy": logps})


# --- best of n --------------------------------------------------------------------------------


def test_best_of_n_is_the_order_of_the_rewards():
    rewards = jax.random.normal(jax.random.key(0), (5, 7))
    np.testing.assert_array_equal(best_of_n(rewards)[:, 0], jnp.argmax(rewards, -1))
    np.testing.assert_array_equal(best_of_n(rewards, num=7), jnp.argsort(-rewards, -1))
    assert best_of_n(jnp.array([1.0, 2.0, 2.0])).tolist() == [1]


def test_best_of_n_overlooks_masked_candidates_and_nan():
    rewards = jnp.array([[jnp.nan, -jnp.inf, jnp.inf, 1.0]])
    where = jnp.array([[True, True, False, True]])
    assert best_of_n(rewards, where, num=4)[0, :2].tolist() == [3, 1]
    with pytest.raises(ValueError, match=r"num must lie in 1..4, .*; got 5"):
        best_of_n(rewards, num=5)


def test_best_of_n_has_the_law_of_the_maximum():
    # Of K uniform rewards the best has mean K / (K + 1) and variance K / ((K + 1)^2 (K + 2)).
    k, n = 6, 20_000
    rewards = jax.random.uniform(jax.random.key(0), (n, k))
    best = jnp.take_along_axis(rewards, best_of_n(rewards), -1)
    deviation = (k / ((k + 1) ** 2 * (k + 2)) / n) ** 0.5
    assert float(best.mean()) == pytest.approx(k / (k + 1), abs=4 * deviation)


def test_take_candidates_takes_every_field():
    drawn = made_completions()
    out = take_candidates(drawn, jnp.array([[2, 0], [1, 1]]))
    np.testing.assert_array_equal(out.tokens[0, 0], drawn.tokens[0, 2])
    np.testing.assert_array_equal(out.token_logps["policy"][1, 1], drawn.logps[1, 1])
    assert out.finish.tolist() == [[2, 0], [0, 0]]


# --- statistical rejection sampling -----------------------------------------------------------


def accepted(rewards, num, beta, seed=0, where=None):
    rewards = jnp.atleast_2d(jnp.asarray(rewards, jnp.float32))
    ids = jnp.arange(len(rewards))
    return rejection_sample(jax.random.key(seed), rewards, ids, num=num, beta=beta, where=where)


def algorithm_1(rewards, num, beta, uniform):
    """The published loop, literally; `uniform[pass][candidate]`."""
    pool, out = dict(enumerate(rewards)), []
    number = 0
    while len(out) < num and pool:
        highest, taken = max(pool.values()), []
        for candidate, reward in pool.items():
            if uniform[number][candidate] >= np.exp((reward - highest) / beta):
                continue
            if len(out) < num:
                out.append(candidate)
                taken.append(candidate)
        for candidate in taken:
            del pool[candidate]
        number += 1
    return out


@pytest.mark.parametrize(("num", "beta"), [(1, 0.5), (8, 0.5), (8, 0.05), (8, 5.0), (20, 0.5)])
def test_rejection_sampling_is_algorithm_1(num, beta):
    rewards = np.asarray(jax.random.normal(jax.random.key(3), (6, 16)), np.float64)
    out = accepted(rewards, num, beta)
    for b in range(6):
        key = jax.random.fold_in(jax.random.key(0), b)
        passes = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(16))
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (16,)))(passes)
        wanted = algorithm_1(rewards[b], num, beta, np.asarray(uniform))
        assert out.indices[b][out.where[b]].tolist() == wanted
        assert int(out.where[b].sum()) == min(num, 16)


def test_acceptance_has_the_law_of_the_tilted_policy():
    # One test of each sample against the true maximum: P(y | accepted) ~ pi(y) exp(r(y) / beta).
    policy = np.array([0.1, 0.2, 0.3, 0.25, 0.15])
    values, beta, prompts, k = np.array([0.3, 1.0, -0.2, 0.5, 0.0]), 0.5, 40_000, 6
    samples = jax.random.choice(jax.random.key(1), 5, (prompts, k), p=jnp.array(policy))
    # One more candidate of the highest reward in every pool, not counted: the maximum is the true.
    rewards = jnp.pad(jnp.array(values)[samples], ((0, 0), (0, 1)), constant_values=values.max())
    out = accepted(rewards, k + 1, beta)
    tilted = policy * np.exp(values / beta)
    # The acceptance identity: the rate is E[exp((r - r_max) / beta)].
    rate = policy @ np.exp((values - values.max()) / beta)
    tested = float((out.first_pass - 1).sum()) / (prompts * k)
    assert tested == pytest.approx(rate, abs=4 * (rate * (1 - rate) / (prompts * k)) ** 0.5)
    position = jnp.arange(k + 1) < out.first_pass[:, None]
    own = position & (out.indices < k)
    first = np.asarray(jnp.take_along_axis(samples, jnp.minimum(out.indices, k - 1), 1))[
        np.asarray(own)
    ]
    counts = np.bincount(first, minlength=5)
    expected = counts.sum() * tilted / tilted.sum()
    assert np.sum((counts - expected) ** 2 / expected) < 20  # 0.9995 of a chi-square with 4
    # The untilted law is far away.
    assert np.sum((counts - counts.sum() * policy) ** 2 / (counts.sum() * policy)) > 1000


def test_a_tiny_beta_takes_the_highest_and_a_huge_one_the_first():
    rewards = jax.random.normal(jax.random.key(0), (4, 20))
    few = accepted(rewards, 8, 1e-6)
    np.testing.assert_array_equal(few.indices, jnp.argsort(-rewards, -1)[:, :8])
    many = accepted(rewards, 8, 1e9)
    np.testing.assert_array_equal(many.indices, jnp.broadcast_to(jnp.arange(8), (4, 8)))
    np.testing.assert_array_equal(many.first_pass, [20] * 4)


def test_the_best_is_always_accepted_in_the_first_pass():
    rewards = jax.random.normal(jax.random.key(0), (200, 12))
    out = accepted(rewards, 12, 0.3)
    in_first = jnp.arange(12) < out.first_pass[:, None]
    best = jnp.argmax(rewards, -1)[:, None]
    assert jnp.any((out.indices == best) & in_first, -1).all()


def test_only_differences_of_rewards_count():
    rewards = jnp.round(jax.random.normal(jax.random.key(0), (50, 12)) * 64) / 64
    moved = accepted(rewards + 1024.0, 5, 0.5)
    np.testing.assert_array_equal(accepted(rewards, 5, 0.5).indices, moved.indices)
    assert jnp.isfinite(accepted(rewards * 1e4, 5, 0.5).indices).all()


def test_draws_depend_on_the_prompts_id_alone():
    rewards = jax.random.normal(jax.random.key(0), (5, 12))
    whole = rejection_sample(jax.random.key(1), rewards, jnp.arange(5), num=4, beta=0.5)
    alone = rejection_sample(jax.random.key(1), rewards[3:4], jnp.array([3]), num=4, beta=0.5)
    np.testing.assert_array_equal(whole.indices[3], alone.indices[0])
    other = rejection_sample(jax.random.key(2), rewards, jnp.arange(5), num=4, beta=0.5)
    assert (whole.indices != other.indices).any()


def test_a_pool_that_runs_short_is_reported():
    rewards = jnp.array([[1.0, jnp.nan, jnp.inf, 2.0, -jnp.inf], [3.0] * 5])
    where = jnp.array([[True, True, False, True, True], [False] * 5])
    out = accepted(rewards, 4, 0.5, where=where)
    assert out.where.sum(-1).tolist() == [3, 0]
    assert set(out.indices[0, :3].tolist()) == {0, 3, 4}
    assert out.tried.tolist() == [3, 0]


def test_rejection_sampling_compiles_once_and_refuses_bad_settings():
    run = jax.jit(rejection_sample, static_argnames=("num", "beta"))
    rewards, ids = jnp.zeros((3, 4)), jnp.arange(3)
    run(jax.random.key(0), rewards, ids, num=2, beta=0.5)
    key, rewards = jax.block_until_ready((jax.random.key(1), rewards + 1))
    with compilations() as compiled:
        run(key, rewards, ids, num=2, beta=0.5)
    assert compiled.count == 0
    with pytest.raises(ValueError, match="beta must be above 0; got 0"):
        accepted(rewards, 2, 0.0)
    with pytest.raises(ValueError, match="num must be at least 1; got 0"):
        accepted(rewards, 0, 1.0)


# --- counting ---------------------------------------------------------------------------------


def test_distinct_keeps_the_first_of_equal_completions():
    tokens = jnp.array([[[5, 0], [5, 0], [5, 0], [6, 0]]])
    mask = jnp.array([[[True, True], [True, False], [True, True], [True, True]]])
    drawn = Completions(tokens, mask, mask * 0.0, tokens[..., 0])
    assert distinct(drawn).tolist() == [[True, True, False, True]]


def test_finish_shares_count_every_reason():
    drawn = made_completions()
    shares = {name: float(mean.value) for name, mean in finish_shares(drawn).items()}
    assert shares == pytest.approx(
        {
            "length": 4 / 6,
            "stop_token": 1 / 6,
            "stop_sequence": 1 / 6,
            "none_finished": 0.5,
            "tokens": 4,
        }
    )
    both = finish_shares(drawn)["length"] + finish_shares(drawn)["length"]
    assert float(both.count) == 12
    assert drawn.finished.tolist() == [[False, True, True], [False] * 3]
    assert {reason.value for reason in Finish} == {0, 1, 2}
