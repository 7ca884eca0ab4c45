"""OREO: the soft Bellman equation on a tree, and where the gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.soft_bellman import oreo_loss, oreo_policy_loss, oreo_value_loss
from tests.losses.tabular import (
    Tree,
    assert_close,
    float64,  # noqa: F401  (a fixture)
)

BETA = 0.5
RNG = np.random.default_rng(0)
MASK = np.arange(5) < np.array([3, 5])[:, None]
POLICY, REFERENCE = RNG.uniform(-3, -1, (2, 2, 5))
VALUES, REWARDS = RNG.standard_normal((2, 5)), np.array([1.0, -0.5])
ENDS = np.array([[0, 1, 1, 0, 0], [1, 0, 0, 1, 1]])  # steps of 2, 1 and 1, 3, 1 tokens
INPUTS = (POLICY, REFERENCE, VALUES, MASK, REWARDS)


def ratios_to_come(row):
    ratios = np.where(MASK[row], POLICY[row] - REFERENCE[row], 0)
    return np.cumsum(ratios[::-1])[::-1]


@pytest.mark.parametrize(
    ("level", "states"),
    [
        ("token", ([0, 1, 2], [0, 1, 2, 3, 4])),
        ("step", ([0, 2], [0, 1, 4])),
        ("response", ([0], [0])),
    ],
)
def test_both_are_the_mean_square_by_which_the_states_miss_the_equation(level, states):
    wanted = np.mean(
        [
            np.mean((VALUES[row] - REWARDS[row] + BETA * ratios_to_come(row))[states[row]] ** 2)
            for row in (0, 1)
        ]
    )
    options = {"beta": BETA, "level": level}
    assert_close(oreo_value_loss(*INPUTS, ENDS, **options).value, wanted)
    assert_close(oreo_policy_loss(*INPUTS, ENDS, alpha=0.0, **options).value, wanted)


@pytest.mark.parametrize(
    ("level", "starts"),
    [
        ("token", [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        ("step", [[0, 0, 2, 0, 0], [0, 1, 1, 1, 4]]),
        ("response", [[0] * 5, [0] * 5]),
    ],
)
def test_an_action_is_corrected_by_the_gap_of_its_own_state_alone(level, starts):
    options = {"beta": BETA, "level": level, "alpha": 0.0}
    found = jax.grad(lambda s: oreo_policy_loss(s, *INPUTS[1:], ENDS, **options).total)(POLICY)
    number = {"token": [3, 5], "step": [2, 3], "response": [1, 1]}[level]
    for row in (0, 1):
        gaps = VALUES[row] - REWARDS[row] + BETA * ratios_to_come(row)
        wanted = 2 * BETA * gaps[starts[row]] / number[row]
        assert_close(found[row], np.where(MASK[row], wanted, 0))


def test_the_kl_term_is_the_mean_over_tokens_of_its_positive_estimate():
    with_kl, without = (oreo_policy_loss(*INPUTS, alpha=a).value for a in (0.3, 0.0))
    d = REFERENCE - POLICY
    k3 = np.exp(d) - d - 1
    assert_close(with_kl - without, 0.3 * np.mean([k3[0, :3].mean(), k3[1].mean()]))


def test_critic_moves_values_only_and_actor_the_policy_only():
    for loss, moved in ((oreo_value_loss, 2), (oreo_policy_loss, 0)):
        run = lambda s, q, v: loss(s, q, v, MASK, REWARDS).total  # noqa: B023, E731
        gradients = jax.grad(run, argnums=(0, 1, 2))(*map(jnp.asarray, INPUTS[:3]))
        for i, found in enumerate(gradients):
            assert np.any(np.asarray(found)) == (i == moved)


def test_values_and_rewards_shift_together():
    moved = (POLICY, REFERENCE, VALUES + 3.0, MASK, REWARDS + 3.0)
    assert_close(oreo_loss(*moved).value, oreo_loss(*INPUTS).value)


def test_together_they_are_the_sum():
    actor = oreo_policy_loss(*INPUTS, beta=BETA, alpha=0.2).value
    critic = oreo_value_loss(*INPUTS, beta=BETA).value
    both = oreo_loss(*INPUTS, beta=BETA, alpha=0.2, value_weight=0.7).value
    assert_close(both, actor + 0.7 * critic)


def optimum(rewards, reference):
    """Log-probs `[9, 2]` of the best regularised policy, and soft values `[9, 2]` before tokens."""
    tree = Tree(vocab=3)
    joint = (np.asarray(tree.logps(reference)) + rewards / BETA).reshape(3, 3)
    after = BETA * np.log(np.exp(joint).sum(-1))  # plus the first token's own log-prob
    logits = np.concatenate([np.log(np.exp(joint).sum(-1))[None], joint])
    first = np.asarray(tree.token_logps(reference))[::3, 0]
    start = BETA * np.log(np.exp(joint).sum())
    values = np.stack([np.full(9, start), np.repeat(after - BETA * first, 3)], -1)
    return np.asarray(tree.token_logps(logits)), values


def test_the_best_policy_and_its_value_solve_it_on_any_data():
    tree, rewards = Tree(vocab=3), np.random.default_rng(1).standard_normal(9)
    reference = tree.logits(2)
    policy, values = optimum(rewards, reference)
    fixed, mask = np.asarray(tree.token_logps(reference)), np.ones((9, 2), bool)
    for level in ("token", "response"):
        options = {"beta": BETA, "level": level, "alpha": 0.0}
        assert_close(oreo_loss(policy, fixed, values, mask, rewards, **options).value, 0)
    # The last token: V = R - beta * log-ratio. Telescoping: V(s) - V(s') + beta l = 0 before it.
    ratios = policy - fixed
    assert_close(values[:, 1], rewards - BETA * ratios[:, 1])
    assert_close(values[:, 0] - values[:, 1] + BETA * ratios[:, 0], np.zeros(9))


def test_trained_on_the_tree_it_finds_the_best_policy():
    tree, rewards = Tree(vocab=3), np.random.default_rng(1).standard_normal(9)
    reference = tree.logits(2)
    fixed, mask = tree.token_logps(reference), jnp.ones((9, 2), bool)
    nodes = jnp.array([[0, 1 + a] for a in range(3) for _ in range(3)])

    def loss(parameters):
        policy = tree.token_logps(parameters["logits"])
        values = parameters["values"][nodes]
        return oreo_loss(policy, fixed, values, mask, rewards, beta=BETA, alpha=0.0).value

    step = jax.jit(lambda p: jax.tree.map(lambda x, g: x - 1.5 * g, p, jax.grad(loss)(p)))
    parameters = {"logits": jnp.asarray(reference), "values": jnp.zeros(4)}
    for _ in range(3000):
        parameters = step(parameters)
    policy, values = optimum(rewards, reference)
    assert_close(tree.token_logps(parameters["logits"]), policy, atol=1e-6)
    assert_close(parameters["values"][nodes], values, atol=1e-6)


def test_empty_completions_are_not_counted():
    mask = MASK & np.array([True, False])[:, None]
    found = oreo_loss(POLICY, REFERENCE, VALUES, mask, REWARDS)
    alone = oreo_loss(*(x[:1] for x in INPUTS))
    assert float(found.count) == 1
    assert_close(found.value, alone.value)


def test_steps_ask_for_their_ends():
    with pytest.raises(ValueError, match="step_mask"):
        oreo_loss(*INPUTS, level="step")
