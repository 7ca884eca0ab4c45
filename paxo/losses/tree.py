r"""Tree preference optimisation: lists of reasoning paths, their steps weighted by similarity."""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import Positive
from paxo.losses.lipo import lambda_weights
from paxo.losses.ranking import better_pairs, differences
from paxo.numerics import Array, at_least_float32, masked, safe_divide


def tpo_tree_loss(
    policy_token_logps: Array,
    reference_token_logps: Array,
    token_mask: Array,
    labels: Array,
    step_ends: Array,
    step_similarities: Array,
    *,
    beta: Positive = 0.1,
    step_weight: Literal["1+cos", "1-cos", "none"] = "1+cos",
    ranking_loss: Literal["lambda", "pair_logistic"] = "lambda",
    where: Array | None = None,
) -> Array:
    r"""Tree preference optimisation, experimental: a ranking loss on adaptive step rewards.

    $s_i = \beta \sum_m w_{im} d_{im} / \sum_m w_{im}$, with $d_{im}$ the mean over the tokens of
    step m of $\log\pi - \log\pi_{ref}$ and $w_{im} = 1 \pm \cos$ of the step's hidden state and
    that of the best path's step m. Lists are cut to the number of steps of their shortest path. The
    ranking loss sums over pairs $\psi_i > \psi_j$, by default weighted as in LiPO-lambda (base 2,
    no factor K).

    The paper's equations were not obtained; this is what its text and the intent of its code agree
    on. The sign of the cosine is an open question. With one step, or without weights, equal steps
    and two paths "pair_logistic" is length-normalised DPO.

    Args:
        policy_token_logps: `[..., K, T]` token log-probs in nats.
        reference_token_logps: `[..., K, T]` the same under the reference policy.
        token_mask: `[..., K, T]` bool, True on scored tokens.
        labels: `[..., K]` grades in [0, 1] (the code's judge gives -100 to 100: rescale them).
        step_ends: `[..., K, T]` above 0.5 on the last token of each step.
        step_similarities: `[..., K, T]` cosines, the same for all tokens of a step (they are
            averaged); no gradient is taken, and "none" does not read them.
        beta: scale of the implicit reward, > 0.
        step_weight: "1+cos" as in the code, which favours shared steps; "1-cos" the steps that
            tell paths apart; "none" weighs all alike.
        ranking_loss: "lambda" or "pair_logistic", all weights 1.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; 0 where no two paths differ in grade.

    >>> policy = jnp.array([[-1.0, -1.0], [-2.0, -2.0]])
    >>> ends, mask = jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.ones((2, 2), bool)
    >>> grades, form = jnp.array([1.0, 0.0]), {"beta": 1.0, "ranking_loss": "pair_logistic"}
    >>> alike = jnp.ones((2, 2))
    >>> tpo_tree_loss(policy, jnp.full((2, 2), -1.0), mask, grades, ends, alike, **form)
    Array(0.3132617, dtype=float32)

    Liao et al. 2024, arXiv:2410.12854. The public code minimises -log sigma(beta * ranking loss),
    which raises the ranking loss, scores all tokens under the first position, and counts pairs
    twice; it is no reference.
    """
    if where is None:
        where = jnp.ones(labels.shape, bool)
    chex.assert_equal_shape([policy_token_logps, reference_token_logps, token_mask])
    chex.assert_equal_shape([token_mask, step_ends, step_similarities])
    chex.assert_equal_shape([labels, where])
    kept = jnp.asarray(token_mask, bool) & where[..., None]
    policy, reference = (
        at_least_float32(policy_token_logps),
        at_least_float32(reference_token_logps),
    )
    ratios = masked(policy, kept) - masked(reference, kept)
    ends = kept & (step_ends > 0.5)
    # A step's number is the number of steps that ended before the token.
    step = jnp.cumsum(ends, axis=-1) - ends
    tokens = _by_step(kept.astype(ratios.dtype), step, kept)
    rewards = safe_divide(_by_step(ratios, step, kept), tokens)
    weights = jnp.ones_like(rewards)
    if step_weight != "none":
        cosines = jax.lax.stop_gradient(masked(at_least_float32(step_similarities), kept))
        cosines = safe_divide(_by_step(cosines, step, kept), tokens).astype(ratios.dtype)
        weights = 1 + cosines if step_weight == "1+cos" else 1 - cosines
    steps = jnp.sum(tokens > 0, axis=-1)
    shortest = jnp.min(jnp.where(where, steps, steps.shape[-1] + tokens.shape[-1]), axis=-1)
    counted = (jnp.arange(tokens.shape[-1]) < shortest[..., None, None]) & (tokens > 0)
    weights = masked(weights, counted)
    total = jnp.sum(weights, axis=-1)
    scores = beta * jnp.sum(weights * rewards, axis=-1) / jnp.where(total > 0, total, 1)
    return _ranked(scores, masked(at_least_float32(labels), where), where, ranking_loss)


def _by_step(x: Array, step: Array, where: Array) -> Array:
    """`[..., T]` sums over the tokens of step 0, 1, ...; at most T steps."""
    size = x.shape[-1]
    rows = jnp.arange(x.size // size).reshape(*x.shape[:-1], 1)
    segment = (rows * size + step).reshape(-1)
    return jax.ops.segment_sum(masked(x, where).reshape(-1), segment, x.size).reshape(x.shape)


def _ranked(scores: Array, labels: Array, where: Array, ranking_loss: str) -> Array:
    loss = jax.nn.softplus(-differences(scores))
    if ranking_loss == "lambda":
        loss = loss * lambda_weights(scores, labels, where)
    return jnp.sum(masked(loss, better_pairs(labels, where)), axis=(-2, -1))
