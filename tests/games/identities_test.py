"""Where other losses come to rest on exact games, and identities between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.games import builders, exact
from paxo.games.expected import expected_loss
from paxo.games.updates import fitted
from paxo.objectives import objective
from tests.games.playing import close

with jax.enable_x64(True):
    GAMES = builders.numpy_game(3, 6, beta=0.3, num_games=4)
    POLICIES = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)))


# B.6. CoPG's bandit: the stationary regrets of four methods on its offline pairs.


def stationary(loss, rewards, values=lambda bandit, logits: 0.0, rate=0.5):
    """Regret where gradient descent on the expected offline loss comes to rest."""
    bandit = builders.copg_bandit()
    game = bandit.game()

    def run(logits):
        shown = {rewards: bandit.rewards + 0.5 - values(bandit, jax.lax.stop_gradient(logits))}
        return expected_loss(
            loss, game, logits, sampler=list(bandit.offline_logps), extras=shown if rewards else {}
        )

    def descend(carry):
        x, slope = carry
        x = x - rate * slope
        return x, jax.grad(run)(x)

    def moving(carry):
        return jnp.abs(carry[1]).max() > 1e-13

    logits, _ = jax.jit(lambda x: jax.lax.while_loop(moving, descend, (x, jnp.ones(3))))(
        jnp.zeros(3)
    )
    return float(bandit.regret(logits)), np.exp(jax.nn.log_softmax(logits))


def test_stationary_regrets_on_copgs_bandit():
    expected_reward = lambda bandit, logits: jax.nn.softmax(logits) @ bandit.rewards  # noqa: E731
    gradient = objective("nash_md_pg", tau=0.5)  # -(reward - 1/2 - tau log-ratio) log-prob
    assert stationary(objective("copg", beta=0.5), "rewards")[0] == pytest.approx(0, abs=1e-12)
    regret, policy = stationary(objective("ipo", tau=0.5), "")
    assert regret == pytest.approx(0.15253, abs=5e-6)
    np.testing.assert_allclose(policy, [0.424, 0.353, 0.223], atol=5e-4)
    assert stationary(gradient, "win_rates")[0] == pytest.approx(0.63779, abs=5e-6)
    with_value, _ = stationary(gradient, "win_rates", expected_reward)
    assert with_value == pytest.approx(0.014817, abs=5e-7)


def test_copg_rests_at_the_same_policy_wherever_the_pairs_come_from():
    bandit = builders.copg_bandit()
    game, loss = bandit.game(), objective("copg", beta=0.5)

    def run(x, samplers):
        extras = {"rewards": bandit.rewards}
        return expected_loss(loss, game, x, sampler=list(samplers), extras=extras)

    slope = jax.jit(jax.grad(run))
    for seed in range(3):
        samplers = jnp.asarray(np.random.default_rng(seed).standard_normal((2, 3)))
        close(slope(bandit.best_policy, samplers), 0)
        assert np.abs(slope(jnp.zeros(3), samplers)).max() > 1e-2


# B.8. Identities.


def test_online_ipo_is_four_over_tau_of_self_play():
    def self_play(x):
        p = jax.nn.softmax(x)
        played = jnp.sum(p * GAMES.win_rates(jax.lax.stop_gradient(x)), -1)
        return (played - 0.3 * exact.kl_divergence(x, GAMES.reference_logps)).sum()

    loss = objective("online_ipo", tau=0.3)
    on_own = lambda x: expected_loss(loss, GAMES, x, sampler=POLICIES).sum()  # noqa: E731
    found, expected = jax.jit(lambda x: (jax.grad(on_own)(x), jax.grad(self_play)(x)))(POLICIES)
    close(found, -4 / 0.3 * expected)


def test_ipo_md_rests_where_the_mixture_is_the_nash_policy_of_a_larger_kl_weight():
    tau, mix = 0.3, 0.125
    mixture = exact.nash_policy(GAMES.replace(beta=tau / (1 - mix)))
    policy = GAMES.reference_logps + GAMES.win_rates(mixture) / tau
    close(exact.mixture(policy, GAMES.reference_logps, mix), mixture)
    loss = objective("ipo_md", tau=tau)
    on_mixture = lambda x: expected_loss(loss, GAMES, x, sampler=mixture).sum()  # noqa: E731
    close(jax.jit(jax.grad(on_mixture))(policy), 0)
    cycle = builders.cyclic(3, beta=0.1, win=0.9)
    run = lambda x: expected_loss(objective("ipo_md", tau=0.1), cycle, x, sampler=x)  # noqa: E731
    close(jax.jit(jax.grad(run))(jnp.zeros(3)), 0)


def test_inpos_label_and_win_rate_forms_differ_by_a_constant():
    forms = [objective("inpo", eta=0.9, tau=0.3, target=x) for x in ("label", "win_rate")]

    @jax.jit
    def difference(x):
        own = {"sampler": POLICIES, "opponent": POLICIES, "previous": POLICIES}
        label, win_rate = (expected_loss(form, GAMES, x, **own) for form in forms)
        return label - win_rate

    spread = np.stack([difference(x) for x in (POLICIES, 2 * POLICIES)])
    np.testing.assert_allclose(spread[0], spread[1], atol=1e-13)


def test_a_dno_round_improves_by_at_least_eta_times_the_kl():
    fit = fitted(objective("dno", eta=0.7), newton_steps=8)
    found = jax.jit(lambda x: fit(x, GAMES, 0))(POLICIES)
    wins = (jax.nn.softmax(found) * GAMES.win_rates(POLICIES)).sum(-1)
    assert bool((wins >= 0.5 + 0.7 * exact.kl_divergence(found, POLICIES) - 1e-12).all())


def test_vpos_bonus_is_the_value_of_the_best_policy():
    # For rewards centred under a policy c: J* = -beta E_c log(best / reference).
    beta, rewards = 0.4, jnp.array([1.0, -0.3, 0.2])
    reference = jax.nn.log_softmax(jnp.array([0.3, 0.0, -1.0]))
    centre = jax.nn.softmax(jnp.array([0.0, 1.0, 0.5]))
    bandit = builders.Bandit(rewards - centre @ rewards, reference, jnp.asarray(beta))
    bonus = -beta * centre @ (bandit.best_policy - reference)
    close(bandit.value(bandit.best_policy), bonus, 1e-15)
