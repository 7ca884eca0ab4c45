"""Token-level losses: identities, stopped gradients, masks, and the token MDP."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paxo.losses.pairwise import dpo_loss
from paxo.losses.tokenwise import (
    d3po_loss,
    sparse_po_loss,
    tdpo1_loss,
    tdpo2_loss,
    token_dpo_loss,
    token_rewards,
)

RNG = np.random.default_rng(0)
SHAPE = (3, 2, 4)
MASK = np.arange(4) < np.array([[4, 2], [1, 3], [3, 3]])[..., None]
POLICY, REFERENCE = (RNG.uniform(-2, -0.1, SHAPE).astype(np.float32) for _ in range(2))
KLS, WEIGHTS = (RNG.uniform(0.1, 1, SHAPE).astype(np.float32) for _ in range(2))
ONES = np.ones(SHAPE, np.float32)


def softplus(x):
    return np.logaddexp(0, x)


def summed(x):
    return np.where(MASK, x, 0).sum(-1, dtype=np.float64)


U, D = summed(POLICY - REFERENCE), summed(KLS)  # [3, 2] log-ratios and divergences


def test_token_dpo_is_dpo_of_the_sums():
    expected = dpo_loss(summed(POLICY), summed(REFERENCE), beta=0.7)
    found = token_dpo_loss(POLICY, REFERENCE, MASK, beta=0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_token_rewards_add_up_to_the_implicit_reward():
    rewards = token_rewards(POLICY, REFERENCE, MASK, beta=0.7)
    np.testing.assert_allclose(rewards.sum(-1), 0.7 * U, rtol=1e-5)
    np.testing.assert_array_equal(rewards[~MASK], 0)


def tree(logits, reference_logits):
    """`[8, 3]` log-probs of the tokens of all leaves of a binary tree of depth 3, twice."""
    leaves = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    nodes = np.array([[0, 1 + a, 3 + 2 * a + b] for a, b, _ in leaves])
    return [jax.nn.log_softmax(x, -1)[nodes, np.array(leaves)] for x in (logits, reference_logits)]


def soft_advantages(rewards, reference_logits, beta):
    """`[8, 3]` r + V(s') - V(s) of each token, V by soft Bellman backups from the leaves."""
    logps = np.asarray(jax.nn.log_softmax(reference_logits, -1))
    values = {3: np.asarray(rewards)}
    for depth, nodes in ((2, slice(3, 7)), (1, slice(1, 3)), (0, slice(0, 1))):
        scores = logps[nodes] + values[depth + 1].reshape(-1, 2) / beta
        values[depth] = beta * np.logaddexp(scores[:, 0], scores[:, 1])
    along = [np.repeat(values[depth], 8 // 2**depth) for depth in range(4)]
    return np.diff(np.stack(along, -1), axis=-1)


def test_dpo_fitted_on_a_tree_gives_each_token_its_soft_advantage():
    beta = 0.5
    with jax.enable_x64(True):
        rewards = np.random.default_rng(1).normal(size=8)
        reference = jnp.asarray(np.random.default_rng(2).normal(size=(7, 2)))
        wins = jax.nn.sigmoid(rewards[:, None] - rewards)
        first, second = np.divmod(np.arange(64), 8)
        mask = jnp.ones((64, 2, 3), bool)

        def expected_loss(flat):
            policy, fixed = (
                jnp.stack([x[first], x[second]], 1) for x in tree(flat.reshape(7, 2), reference)
            )
            return jnp.sum(wins.ravel() * token_dpo_loss(policy, fixed, mask, beta=beta))

        def margins(flat):
            rewards = token_rewards(*tree(flat.reshape(7, 2), reference), True, beta=beta).sum(-1)
            return rewards[first] - rewards[second]

        derivatives = jax.jit(lambda x: (jax.grad(expected_loss)(x), jax.jacfwd(margins)(x)))
        flat = reference.ravel()
        for _ in range(12):  # Gauss-Newton; a constant added to a node's logits changes nothing
            gradient, jacobian = derivatives(flat)
            curvature = np.asarray(jax.nn.sigmoid(margins(flat)) * jax.nn.sigmoid(-margins(flat)))
            hessian = jacobian.T @ (curvature[:, None] / 2 * jacobian)
            flat = flat - np.linalg.pinv(np.asarray(hessian), rcond=1e-9) @ gradient
        found = token_rewards(
            *tree(flat.reshape(7, 2), reference), np.ones((8, 3), bool), beta=beta
        )
        np.testing.assert_allclose(found, soft_advantages(rewards, reference, beta), atol=1e-9)


def test_tdpo1_is_its_formula():
    margins = (U[:, 0] - U[:, 1]) - (D[:, 1] - D[:, 0])
    found = tdpo1_loss(POLICY, REFERENCE, KLS, MASK, beta=0.4)
    np.testing.assert_allclose(found, softplus(-0.4 * margins), rtol=1e-5)


def test_tdpo2_is_its_formula_and_dpo_without_the_divergences():
    margins = (U[:, 0] - U[:, 1]) - 0.7 * (D[:, 1] - D[:, 0])
    found = tdpo2_loss(POLICY, REFERENCE, KLS, MASK, beta=0.4, alpha=0.7)
    np.testing.assert_allclose(found, softplus(-0.4 * margins), rtol=1e-5)
    dpo = token_dpo_loss(POLICY, REFERENCE, MASK)
    np.testing.assert_allclose(tdpo2_loss(POLICY, REFERENCE, KLS, MASK, alpha=0.0), dpo, rtol=1e-6)


def test_equal_divergences_make_tdpo1_dpo():
    whole = np.ones_like(MASK)
    found = tdpo1_loss(POLICY, REFERENCE, ONES, whole)
    np.testing.assert_allclose(found, token_dpo_loss(POLICY, REFERENCE, whole), rtol=1e-6)


def test_tdpo2_at_alpha_one_has_tdpo1s_value_but_no_gradient_through_the_chosen_divergence():
    def run(loss, **settings):
        total = lambda kls: jnp.sum(loss(POLICY, REFERENCE, kls, MASK, **settings))  # noqa: E731
        return jax.value_and_grad(total)(jnp.asarray(KLS))

    (first, one), (second, two) = run(tdpo1_loss), run(tdpo2_loss, alpha=1.0)
    assert float(first) == pytest.approx(float(second), rel=1e-6)
    assert (np.asarray(one)[:, 0][MASK[:, 0]] != 0).all()
    np.testing.assert_array_equal(two[:, 0], 0)
    np.testing.assert_allclose(two[:, 1], one[:, 1], rtol=1e-6)


def test_at_the_reference_all_are_log_two_with_dpos_gradient():
    # KL and its gradient vanish where policy and reference agree.
    logits = jnp.asarray(RNG.normal(size=(2, 3, 5)), jnp.float32)
    reference = jax.nn.log_softmax(logits)
    mask = jnp.ones((2, 3), bool)

    def run(loss):
        def total(logits):
            logps = jax.nn.log_softmax(logits)
            kls = jnp.sum(jnp.exp(reference) * (reference - logps), -1)
            return loss(logps[..., 0], reference[..., 0], kls)

        return jax.value_and_grad(total)(logits)

    dpo = run(lambda s, q, k: token_dpo_loss(s, q, mask))
    assert float(dpo[0]) == pytest.approx(math.log(2))
    for loss in (
        lambda s, q, k: tdpo1_loss(s, q, k, mask),
        lambda s, q, k: tdpo2_loss(s, q, k, mask),
        lambda s, q, k: sparse_po_loss(s, q, k, mask, jnp.ones((2, 3))),
    ):
        found = run(loss)
        assert float(found[0]) == pytest.approx(math.log(2))
        np.testing.assert_allclose(found[1], dpo[1], atol=1e-7)


def test_sparse_po_with_weights_of_one_is_tdpo1_in_value_and_gradient():
    def run(loss):
        total = lambda s, k: jnp.sum(loss(s, k))  # noqa: E731
        return jax.value_and_grad(total, (0, 1))(jnp.asarray(POLICY), jnp.asarray(KLS))

    found = run(lambda s, k: sparse_po_loss(s, REFERENCE, k, MASK, ONES))
    expected = run(lambda s, k: tdpo1_loss(s, REFERENCE, k, MASK))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_sparse_po_without_divergences_is_dpo_and_weighs_both_sums():
    dpo = token_dpo_loss(POLICY, REFERENCE, MASK)
    found = sparse_po_loss(POLICY, REFERENCE, KLS, MASK, ONES, np.zeros(SHAPE))
    np.testing.assert_allclose(found, dpo, rtol=1e-6)
    u, d = summed(WEIGHTS * (POLICY - REFERENCE)), summed((1 - WEIGHTS) * KLS)
    margins = u[:, 0] - u[:, 1] + d[:, 0] - d[:, 1]
    found = sparse_po_loss(POLICY, REFERENCE, KLS, MASK, WEIGHTS, 1 - WEIGHTS, beta=0.8)
    np.testing.assert_allclose(found, softplus(-0.8 * margins), rtol=1e-5)


def test_sparse_po_learns_its_weights_and_cuts_them_at_exactly_0():
    def total(weights):
        return jnp.sum(sparse_po_loss(POLICY, REFERENCE, KLS, MASK, weights, l1_u=0.01))

    gradient = jax.grad(total)(jnp.asarray(WEIGHTS))
    assert (np.asarray(gradient)[MASK] != 0).all()
    np.testing.assert_array_equal(gradient[~MASK], 0)
    np.testing.assert_array_equal(jax.grad(total)(-jnp.asarray(WEIGHTS)), 0)
    without = sparse_po_loss(POLICY, REFERENCE, KLS, MASK, -WEIGHTS, l1_u=0.01)
    np.testing.assert_allclose(without, math.log(2), rtol=1e-6)


def test_sparse_po_norms_run_over_the_scored_tokens_of_both_candidates():
    given = (POLICY, REFERENCE, KLS, MASK, WEIGHTS, 2 * WEIGHTS)
    term = sparse_po_loss(*given, l1_u=0.3, l1_d=0.1) - sparse_po_loss(*given)
    np.testing.assert_allclose(term, (0.3 + 0.1 * 2) * summed(WEIGHTS).sum(-1), rtol=1e-5)


def test_activation_masks_are_rescaled_within_a_completion_and_carry_no_gradient():
    activations = RNG.normal(size=SHAPE).astype(np.float32)
    low = np.where(MASK, activations, np.inf).min(-1, keepdims=True)
    high = np.where(MASK, activations, -np.inf).max(-1, keepdims=True)
    spread = np.where(high > low, high - low, 1)
    given = (POLICY, REFERENCE, KLS, MASK)
    expected = sparse_po_loss(*given, np.where(MASK, (activations - low) / spread, 0))
    found = sparse_po_loss(*given, activations, mask_type="activations")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    standard = 3 * activations - 7  # what a z-score does
    found = sparse_po_loss(*given, standard, mask_type="activations")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    gradient = jax.grad(
        lambda w: jnp.sum(sparse_po_loss(*given, w, l1_u=1.0, mask_type="activations"))
    )(jnp.asarray(activations))
    np.testing.assert_array_equal(gradient, 0)


def d3po_by_steps(labels, epsilon):
    """The authors' formula: exponentiate, clamp the ratio, take the log, step by step."""
    ratios = np.clip(np.exp(POLICY - REFERENCE), 1 - epsilon, 1 + epsilon)
    signs = np.sign(labels - labels[:, ::-1])[..., None]
    steps = softplus(-0.7 * (signs * np.log(ratios)).sum(1))
    return steps[MASK.all(1)]


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_d3po_is_the_authors_formula(epsilon):
    labels = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    found = d3po_loss(POLICY, REFERENCE, MASK, labels, beta=0.7, epsilon=epsilon)
    steps = d3po_by_steps(labels, epsilon)
    assert float(found.count) == len(steps) == 2 + 1 + 3
    assert float(found.value) == pytest.approx(steps.mean(), rel=1e-5)


def test_d3po_of_one_step_within_the_clip_is_dpo():
    policy, reference = POLICY[..., :1], POLICY[..., :1] + 0.05 * REFERENCE[..., :1]
    for labels, order in (((1.0, 0.0), [0, 1]), ((0.0, 1.0), [1, 0])):
        labels = np.broadcast_to(labels, (3, 2))
        found = d3po_loss(policy, reference, MASK[..., :1], labels, epsilon=0.5)
        expected = dpo_loss(policy[:, order, 0], reference[:, order, 0])
        assert float(found.value) == pytest.approx(float(expected.mean()), rel=1e-6)


def test_d3po_ties_and_clipped_steps_have_no_gradient():
    ratio = np.array([[0.3, -0.3]], np.float32)[..., None]  # beyond 1 ± 0.1, the wrong way round
    mask = np.ones((1, 2, 1), bool)
    for ratios, labels in ((ratio, (0.0, 1.0)), (0.1 * ratio, (1.0, 1.0))):
        total = lambda s, labels=labels: d3po_loss(s, 0 * ratio, mask, np.array([labels])).value  # noqa: E731
        value, gradient = jax.value_and_grad(total)(jnp.asarray(ratios))
        np.testing.assert_array_equal(gradient, 0)
        tie = labels[0] == labels[1]
        assert (float(value) == pytest.approx(math.log(2))) == tie


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, q, k, w: token_dpo_loss(s, q, MASK),
        lambda s, q, k, w: tdpo1_loss(s, q, k, MASK),
        lambda s, q, k, w: sparse_po_loss(s, q, k, MASK, w, l1_u=0.1, l1_d=0.2),
        lambda s, q, k, w: d3po_loss(s, q, MASK, MASK[..., 0] * [1, 0], epsilon=0.99).value,
    ],
    ids=["token_dpo", "tdpo1", "sparse_po", "d3po"],
)
def test_gradients_are_the_finite_differences_in_float64(loss):
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in (POLICY, REFERENCE, KLS, WEIGHTS)]
        policy, reference, kls, weights = arrays
        check_grads(
            lambda s, k, w: loss(s, reference, k, w),
            (policy, kls, weights),
            order=1,
            modes=["rev"],
            rtol=1e-6,
        )
