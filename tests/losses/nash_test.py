"""Losses of the regularised game on exact games, where gradients and solutions are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paxo.losses.nash import (
    ipo_md_loss,
    nash_md_loss,
    nash_md_pg_loss,
    online_ipo_loss,
    online_ipo_v1_loss,
    online_ipo_v2_loss,
)
from paxo.losses.pairwise import dpo_loss
from tests.losses.tabular import (
    Tree,
    assert_close,
    expected,
    float64,  # noqa: F401  (a fixture)
    gradient,
    judged,
    log_softmax,
    made_game,
    made_logits,
    pairs,
    product,
    softmax,
    tilted,
    uniform,
)

GAME = made_game(seed=1, size=6, beta=0.3)
POLICY = made_logits(2, 6)


def regression(game, win_rates, weights, loss=online_ipo_v1_loss):
    """`log-probs [N] -> expected loss` of a loss of win rates."""
    q, w = pairs(game.reference), pairs(win_rates)
    return lambda logps: expected(loss(pairs(logps), q, w, beta=game.beta), weights)


def on_own_pairs(game, loss, **settings):
    """`log-probs [N] -> expected loss` on pairs that the live policy draws, a judge answering."""

    def run(logps):
        weights = jax.lax.stop_gradient(jnp.exp(logps)[:, None] * jnp.exp(logps)[None, :])
        return expected(
            loss(pairs(logps), pairs(game.reference), judged(game), **settings), weights
        )

    return run


def self_play_objective(game, tau):
    """p' P sg[p] - tau KL(p|ref): what the live policy gains against itself as it is now."""

    def run(logps):
        p = jnp.exp(logps)
        played = p @ game.preferences @ jax.lax.stop_gradient(p)
        return played - tau * jnp.sum(p * (logps - game.reference))

    return run


# Closed forms on single pairs.


@pytest.mark.parametrize("loss", [online_ipo_v1_loss, nash_md_loss])
def test_regressions_are_the_squared_distance_from_the_difference_of_win_rates(loss):
    s, q, w = np.array([-4.0, -6.5]), np.array([-5.0, -5.5]), np.array([0.8, 0.45])
    expected_value = ((1.0 + 1.0) - (0.8 - 0.45) / 0.2) ** 2
    assert float(loss(s, q, w, beta=0.2)) == pytest.approx(expected_value, rel=1e-12)
    by_token = ((1.0 / 2 + 1.0 / 5) - (0.8 - 0.45) / 0.2) ** 2
    found = loss(s, q, w, np.array([2, 5]), beta=0.2, length_normalize=True)
    assert float(found) == pytest.approx(by_token, rel=1e-12)
    with pytest.raises(ValueError, match="lengths"):
        loss(s, q, w, length_normalize=True)


def test_v2_subtracts_one_half_from_the_pairs_own_preference():
    s, q, p = np.array([-4.0, -6.5]), np.array([-5.0, -5.5]), np.array([0.7, 0.3])
    value = (2.0 - 0.2 / 0.1) ** 2
    assert float(online_ipo_v2_loss(s, q, p, beta=0.1)) == pytest.approx(value, abs=1e-12)
    lengths = np.array([2, 5])
    by_token = online_ipo_v2_loss(s, q, p, lengths, beta=0.1, length_normalize=True)
    assert float(by_token) == pytest.approx((0.7 - 2.0) ** 2, rel=1e-12)


@pytest.mark.parametrize("loss", [online_ipo_loss, ipo_md_loss])
def test_soft_labels_are_the_mean_of_hard_ones(loss):
    s, q = np.array([-4.0, -6.5]), np.array([-5.0, -5.5])
    hard = [float(loss(s, q, np.array(x), tau=0.4)) for x in ([1.0, 0.0], [0.0, 1.0])]
    assert hard == pytest.approx([(2 - 1.25) ** 2, (2 + 1.25) ** 2])
    soft = float(loss(s, q, np.array([0.7, 0.3]), tau=0.4))
    assert soft == pytest.approx(0.7 * hard[0] + 0.3 * hard[1], rel=1e-12)


def test_online_ipo_and_v2_have_the_same_gradient_on_every_pair():
    run = lambda loss, **k: jax.grad(  # noqa: E731
        lambda s: jnp.sum(loss(pairs(s), pairs(GAME.reference), judged(GAME), **k))
    )(jnp.asarray(POLICY))
    assert_close(run(online_ipo_loss, tau=0.2), run(online_ipo_v2_loss, beta=0.2))


def test_policy_gradient_loss_weighs_log_probs_with_what_is_won_beyond_a_half_and_the_kl():
    s, q, w = np.array([-4.0, -6.5]), np.array([-5.0, -5.5]), np.array([0.8, 0.45])
    run = lambda x: nash_md_pg_loss(x, q, w, tau=0.1)  # noqa: E731
    value, grad = jax.value_and_grad(run)(jnp.asarray(s))
    advantages = [0.8 - 0.5 - 0.1 * 1.0, 0.45 - 0.5 + 0.1 * 1.0]
    assert float(value) == pytest.approx((advantages[0] * 4 + advantages[1] * 6.5) / 2)
    assert_close(grad, [-a / 2 for a in advantages])  # no gradient through the log-ratio


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (online_ipo_v1_loss, {"beta": 0.2}),
        (online_ipo_v2_loss, {"beta": 0.2}),
        (online_ipo_loss, {"tau": 0.5}),
    ],
)
def test_gradients_are_finite_differences(loss, settings):
    s, q, x = np.array([[-4.0, -6.5]]), np.array([[-5.0, -5.5]]), np.array([[0.8, 0.2]])
    check_grads(lambda a: loss(a, q, x, **settings), (jnp.asarray(s),), order=2, modes=["rev"])


@pytest.mark.parametrize(
    "loss", [online_ipo_v1_loss, online_ipo_v2_loss, online_ipo_loss, nash_md_pg_loss]
)
def test_no_gradient_goes_through_judgements_and_the_reference(loss):
    s, w = jnp.array([-4.0, -6.5]), jnp.array([0.8, 0.2])
    assert_close(jax.grad(loss, argnums=1)(s, s, w), [0, 0])
    assert_close(jax.grad(loss, argnums=2)(s, s, w), [0, 0])


# Mirror descent, EGPO, Nash-MD.


def test_v1_gradient_on_uniform_pairs_is_four_over_n_of_the_centred_distance():
    win_rates = GAME.win_rates(softmax(POLICY))
    far = POLICY - GAME.reference - win_rates / GAME.beta
    found = gradient(regression(GAME, win_rates, uniform(GAME)), POLICY)
    assert_close(found, 4 / GAME.size * (far - far.mean()))


@pytest.mark.parametrize("eta", [0.1, 0.5, 1 / 0.3])
def test_v1_gradient_step_is_a_mirror_step_of_four_rates_over_beta_n(eta):
    rate = eta * GAME.beta * GAME.size / 4
    loss = regression(GAME, GAME.win_rates(softmax(POLICY)), uniform(GAME))
    found = log_softmax(POLICY - rate * gradient(loss, POLICY))
    assert_close(found, GAME.mirror_step(POLICY, eta))


def test_egpo_is_two_v1_steps_from_the_same_policy():
    eta = 1 / (GAME.beta + 3)
    rate = eta * GAME.beta * GAME.size / 4

    def step(opponent):
        loss = regression(GAME, GAME.win_rates(softmax(opponent)), uniform(GAME))
        return log_softmax(POLICY - rate * gradient(loss, POLICY))

    half = GAME.mirror_step(POLICY, eta)
    assert_close(step(POLICY), half)
    assert_close(step(half), GAME.mirror_step(POLICY, eta, softmax(half)))


def test_egpo_contracts_the_kl_to_the_nash_policy_as_its_theorem_says():
    nash, logits, eta = GAME.nash(), GAME.reference, 1 / (GAME.beta + 3)
    kl = lambda p: np.sum(np.exp(nash) * (nash - p))  # noqa: E731
    rate, first, uniform_pairs = eta * GAME.beta * GAME.size / 4, kl(logits), uniform(GAME)
    grad = jax.jit(
        jax.grad(lambda x, w: regression(GAME, w, uniform_pairs)(jax.nn.log_softmax(x)), argnums=0)
    )
    for t in range(1, 60):
        half = logits - rate * grad(jnp.asarray(logits), GAME.win_rates(softmax(logits)))
        logits = logits - rate * grad(jnp.asarray(logits), GAME.win_rates(softmax(half)))
        logits = log_softmax(logits)
        assert kl(logits) <= (1 - eta * GAME.beta) ** t * first + 1e-15


def test_float32_gives_the_v1_step_of_float64():
    win_rates = GAME.win_rates(softmax(POLICY))
    exact = gradient(regression(GAME, win_rates, uniform(GAME)), POLICY)
    s, q, w = (jnp.asarray(x, jnp.float32) for x in (POLICY, GAME.reference, win_rates))
    weights = jnp.asarray(uniform(GAME), jnp.float32)
    run = lambda x: expected(  # noqa: E731
        online_ipo_v1_loss(pairs(jax.nn.log_softmax(x)), pairs(q), pairs(w), beta=GAME.beta),
        weights,
    )
    np.testing.assert_allclose(jax.grad(run)(s), exact, atol=2e-6)


def test_a_single_sampled_opponent_gives_the_gradient_without_bias():
    # The target enters the gradient linearly: averaging over opponents is averaging gradients.
    opponent = softmax(made_logits(3, 6))
    each = [
        gradient(regression(GAME, GAME.preferences[:, k], uniform(GAME)), POLICY)
        for k in range(GAME.size)
    ]
    exact = gradient(regression(GAME, GAME.win_rates(opponent), uniform(GAME)), POLICY)
    assert_close(opponent @ np.array(each), exact)


def test_nash_md_step_is_the_tilted_mixture():
    # pi+ ∝ mixture * exp(eta P(.>mixture)), mixture = pi^(1 - eta beta) ref^(eta beta)
    eta = 0.4
    mix = eta * GAME.beta
    mixture = log_softmax((1 - mix) * POLICY + mix * GAME.reference)
    win_rates = GAME.win_rates(softmax(mixture))
    loss = regression(GAME, win_rates, uniform(GAME), nash_md_loss)
    found = log_softmax(POLICY - eta * GAME.beta * GAME.size / 4 * gradient(loss, POLICY))
    assert_close(found, tilted(mixture, win_rates, eta))


def test_nash_md_with_a_fixed_mixture_stops_at_the_nash_policy_of_a_larger_kl_weight():
    mix, policy = 0.2, GAME.reference
    for _ in range(4000):  # mirror steps against the mixture
        mixture = log_softmax((1 - mix) * policy + mix * GAME.reference)
        policy = GAME.mirror_step(policy, 0.2, softmax(mixture))
    loss = regression(GAME, GAME.win_rates(softmax(mixture)), uniform(GAME), nash_md_loss)
    assert_close(gradient(loss, policy), np.zeros(GAME.size))
    assert_close(mixture, GAME.nash(GAME.beta / (1 - mix)), atol=1e-10)
    assert np.abs(softmax(policy) - softmax(GAME.nash())).max() > 1e-3


# Gradients on the policy's own samples.


def test_v2_and_online_ipo_follow_the_self_play_policy_gradient():
    exact = -4 / 0.25 * gradient(self_play_objective(GAME, 0.25), POLICY)
    assert_close(gradient(on_own_pairs(GAME, online_ipo_v2_loss, beta=0.25), POLICY), exact)
    assert_close(gradient(on_own_pairs(GAME, online_ipo_loss, tau=0.25), POLICY), exact)


def test_all_but_dpo_are_stationary_at_the_regularised_nash_policy():
    # Bradley–Terry preferences, where the best policy for the rewards is DPO's own solution.
    rewards, beta = np.random.default_rng(3).standard_normal(5), 0.4
    bt = made_game(seed=4, size=5, beta=beta)
    bt = type(bt)(1 / (1 + np.exp(rewards[None, :] - rewards[:, None])), bt.reference, beta)
    nash, best = bt.nash(), tilted(bt.reference, rewards, 1 / beta)
    dpo = lambda s, q, p, *, beta: (  # noqa: E731
        p[..., 0] * dpo_loss(s, q, beta=beta)
        + p[..., 1] * dpo_loss(s[..., ::-1], q[..., ::-1], beta=beta)
    )
    against_itself = regression(bt, bt.win_rates(softmax(nash)), uniform(bt))
    assert_close(gradient(against_itself, nash), np.zeros(5))
    v2, ipo = (
        on_own_pairs(bt, online_ipo_v2_loss, beta=beta),
        on_own_pairs(bt, online_ipo_loss, tau=beta),
    )
    assert_close(gradient(v2, nash), np.zeros(5))
    assert_close(gradient(ipo, nash), np.zeros(5))
    assert np.abs(gradient(ipo, best)).max() > 1e-2
    assert_close(gradient(on_own_pairs(bt, dpo, beta=beta), best), np.zeros(5))
    assert np.abs(gradient(on_own_pairs(bt, dpo, beta=beta), nash)).max() > 1e-3


def ipo_md(game, tau, mixture):
    """`log-probs -> expected IPO-MD loss` on pairs of the mixture's probabilities."""
    return lambda logps: expected(
        ipo_md_loss(pairs(logps), pairs(game.reference), judged(game), tau=tau),
        product(mixture, mixture),
    )


def test_ipo_md_gradient_is_a_covariance_under_the_mixture():
    tau, mix = 0.3, 0.125
    mixture = softmax((1 - mix) * POLICY + mix * GAME.reference)
    advantages = GAME.win_rates(mixture) - tau * (POLICY - GAME.reference)
    scores = np.eye(GAME.size) - softmax(POLICY)  # row y: gradient of log pi(y)
    centred = advantages - mixture @ advantages
    covariance = (mixture * centred) @ scores
    assert_close(gradient(ipo_md(GAME, tau, mixture), POLICY), -4 / tau * covariance)
    uncentred = (mixture * advantages) @ scores
    assert np.linalg.norm(uncentred - covariance) > 1e-3 * np.linalg.norm(covariance)


def test_ipo_md_is_stationary_where_the_mixture_is_the_nash_policy_of_a_larger_kl_weight():
    tau, mix = 0.3, 0.125
    mixture = GAME.nash(tau / (1 - mix))
    policy = tilted(GAME.reference, GAME.win_rates(softmax(mixture)), 1 / tau)
    assert_close(mixture, log_softmax((1 - mix) * policy + mix * GAME.reference), atol=1e-10)
    assert_close(gradient(ipo_md(GAME, tau, softmax(mixture)), policy), 0, atol=1e-10)


def test_ipo_md_is_stationary_at_the_uniform_policy_of_a_symmetric_cycle():
    cycle = np.array([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])
    game = type(GAME)(cycle, np.full(3, -math.log(3)), 0.1)
    assert_close(gradient(ipo_md(game, 0.1, np.full(3, 1 / 3)), game.reference), np.zeros(3))


# Policy gradient over token sequences.

TREE = Tree(vocab=3)
TREE_POLICY, TREE_REFERENCE = TREE.logits(0), TREE.logits(1)
OPPONENT = np.random.default_rng(2).uniform(size=len(TREE.completions))


def mean_gradient(loss):
    """Over all completions, weighed with the policy's fixed probabilities."""
    weights = np.exp(TREE.logps(TREE_POLICY))
    return np.asarray(jax.grad(lambda x: jnp.sum(weights * loss(x)))(jnp.asarray(TREE_POLICY)))


def game_gradient(tau):
    """Of -P(pi > opponent) + tau KL(pi|ref), exactly."""
    q = TREE.logps(TREE_REFERENCE)

    def value(x):
        s = TREE.logps(x)
        return -jnp.exp(s) @ OPPONENT + tau * jnp.sum(jnp.exp(s) * (s - q))

    return np.asarray(jax.grad(value)(jnp.asarray(TREE_POLICY)))


def test_policy_gradient_is_that_of_the_game_on_token_sequences():
    q = TREE.logps(TREE_REFERENCE)[:, None]
    ours = lambda x: nash_md_pg_loss(TREE.logps(x)[:, None], q, OPPONENT[:, None], tau=0.3)  # noqa: E731
    assert_close(mean_gradient(ours), game_gradient(0.3))


def test_the_half_is_only_a_baseline():
    q = TREE.logps(TREE_REFERENCE)[:, None]
    at = lambda rates: mean_gradient(  # noqa: E731
        lambda x: nash_md_pg_loss(TREE.logps(x)[:, None], q, rates[:, None], tau=0.1)
    )
    assert_close(at(OPPONENT), at(OPPONENT + 0.5))


def test_kl_gradients_of_trl_and_easydel_are_not_those_of_the_kl():
    # TRL weighs each token's log-prob with its own log-ratio; EasyDeL also lets a gradient through.
    q = TREE.token_logps(TREE_REFERENCE)
    exact = game_gradient(1.0) - game_gradient(0.0)

    def trl(x):
        s = TREE.token_logps(x)
        return jnp.sum(jax.lax.stop_gradient(s - q) * s, -1)

    def easydel(x):
        s = TREE.token_logps(x)
        return jnp.sum((s - q) * s, -1)

    error = lambda loss: np.linalg.norm(mean_gradient(loss) - exact) / np.linalg.norm(exact)  # noqa: E731
    assert error(trl) > 0.1
    assert error(easydel) > error(trl)
    # What EasyDeL adds is the mean of log-probs' own gradients, sum over tokens of logp * dlogp.
    extra = lambda x: jnp.sum(  # noqa: E731
        jax.lax.stop_gradient(TREE.token_logps(x)) * TREE.token_logps(x), -1
    )
    assert_close(mean_gradient(easydel), mean_gradient(trl) + mean_gradient(extra))


def test_mixture_halves_the_kl_gradient_by_its_weight_on_the_reference():
    # KL(pi|sg[pi^(1-b) ref^b]) has b times the gradient of KL(pi|ref).
    b = 0.4
    mixture = log_softmax((1 - b) * POLICY + b * GAME.reference)
    kl_to = lambda fixed: gradient(lambda s: jnp.sum(jnp.exp(s) * (s - fixed)), POLICY)  # noqa: E731
    policy_gradient = lambda fixed: gradient(  # noqa: E731
        lambda s: jnp.sum(
            softmax(POLICY)
            * nash_md_pg_loss(
                s[:, None], jnp.asarray(fixed)[:, None], np.full((6, 1), 0.5), tau=1.0
            )
        ),
        POLICY,
    )
    assert_close(policy_gradient(GAME.reference), kl_to(GAME.reference))
    assert_close(policy_gradient(mixture), b * kl_to(GAME.reference))


def test_groups_without_their_candidates_count_nothing():
    s, q, w = np.full((3, 2), -4.0), np.full((3, 2), -5.0), np.full((3, 2), 0.7)
    s[:, 0], where = -2.0, np.array([[True, True], [True, False], [False, False]])
    for loss in (online_ipo_v1_loss, online_ipo_v2_loss, online_ipo_loss):
        found = loss(s, q, w, where=where)
        assert found[0] > 0
        assert (found[1:] == 0).all()
    alone = nash_md_pg_loss(s, q, w, tau=0.1, where=where)
    assert_close(alone[1:], [-(0.7 - 0.5 - 0.1 * 3) * -2.0, 0])


def test_arrays_that_do_not_fit_are_refused():
    for loss in (online_ipo_v1_loss, online_ipo_v2_loss, online_ipo_loss, nash_md_loss):
        with pytest.raises(AssertionError):
            loss(jnp.zeros((4, 3)), jnp.zeros((4, 3)), jnp.zeros((4, 3)))
    with pytest.raises(AssertionError):
        nash_md_pg_loss(jnp.zeros((4, 3)), jnp.zeros((4, 3)), jnp.zeros((4, 2)))
