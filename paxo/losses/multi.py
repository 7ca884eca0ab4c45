r"""Preference losses over more than a pair: further completions, drafts, policies or heads.

The candidates of a group are told apart by their place on the last axis.

>>> policy, reference = jnp.array([-4.0, -6.0, -6.0]), jnp.array([-5.0, -5.0, -5.0])
>>> bpo_loss(policy, reference, beta=0.5)  # twice DPO's
Array(0.6265233, dtype=float32)
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import NonNegative, Positive, Probability, Real
from paxo.losses.pairwise import (
    dpo_loss,
    margin,
    pair_log_ratios,
    token_log_ratios,
)
from paxo.numerics import Array, at_least_float32, logsumexp, masked, masked_rows, valid_rows


def bpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    where: Array | None = None,
) -> Array:
    r"""Blind preference optimisation: $-\sum_{j \in \{l, b\}} \log\sigma(\beta(r_w - r_j))$.

    $y_b$ is what the base model answers, "blind" to the image: a second rejected completion that
    teaches not to answer from the text alone.

    Args:
        policy_logps: `[..., 3]` summed completion log-probs in nats: chosen, rejected, blind.
        reference_logps: `[..., 3]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0.
        where: `[..., 3]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; 2 log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> bpo_loss(jnp.array([-4., -6., -4.]), jnp.array([-5., -5., -5.]), beta=0.5)
    Array(1.0064089, dtype=float32)

    Li et al. 2025, arXiv:2503.14189, and the authors' code (`DPO2Trainer`). Several other methods
    are called BPO. TRL, EasyDeL and HALOs do not have it.
    """
    rewards = beta * pair_log_ratios(policy_logps, reference_logps, where, candidates=3)
    margins = rewards[..., :1] - rewards[..., 1:]
    return masked_rows(jnp.sum(jax.nn.softplus(-margins), axis=-1), where)


def srpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    alpha: Probability = 0.5,
    where: Array | None = None,
) -> Array:
    r"""Self-improving robust preference optimisation: a policy and its own reviser at once.

    The same network writes ($r(y)$) and revises a draft ($r_+(y' \mid y)$). At the optimum of the
    min-max problem both identities hold exactly, and with the chosen certain to win their squares
    are the loss $(1-\alpha)L + \alpha L_+$:

    $L = (\tfrac12 - \tfrac\beta2[r_+(w|l) - r_+(l|w) + r(w) - r(l)])^2$,
    $L_+ = (\tfrac12 - \beta[r_+(w|l) - r_+(l|l)])^2 + (\tfrac12 + \beta[r_+(l|w) - r_+(w|w)])^2$.

    Experimental: the identities are derived from the objective and checked on exact games; which
    side of the mixture carries α, and both defaults, are from memory.

    Args:
        policy_logps: `[..., 6]` summed log-probs in nats of w, l, w|l, l|w, w|w, l|l: w chosen, l
            rejected, y|d written as the revision of the draft d, which stands before it unscored.
        reference_logps: `[..., 6]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0.
        alpha: weight of the reviser's own loss, in [0, 1].
        where: `[..., 6]` bool, False on candidates to ignore.

    Returns:
        `[...]`; (1 + α)/4 where policy and reference agree, 0 where a candidate is masked.

    >>> reference = jnp.full(6, -5.0)
    >>> srpo_loss(reference, reference, alpha=0.5)
    Array(0.375, dtype=float32)

    Choi et al. 2024, arXiv:2406.01660. No code of the authors; TRL, EasyDeL and HALOs do not have
    it. Later methods of the same name are others.
    """
    ratios = pair_log_ratios(policy_logps, reference_logps, where, candidates=6)
    w, l, w_l, l_w, w_w, l_l = jnp.moveaxis(ratios, -1, 0)  # noqa: E741
    joint = jnp.square(0.5 - beta / 2 * ((w_l - l_w) + (w - l)))
    reviser = jnp.square(0.5 - beta * (w_l - l_l)) + jnp.square(0.5 + beta * (l_w - w_w))
    return masked_rows((1 - alpha) * joint + alpha * reviser, where)


def opa_dpo_loss(
    policy_token_logps: Array,
    reference_token_logps: Array,
    token_mask: Array,
    response_weights: Array | None = None,
    image_weights: Array | None = None,
    *,
    beta: Positive = 0.1,
    revised_coef: NonNegative = 1.0,
    copo_coef: NonNegative = 0.2,
    anchor: Real = 0.0,
    anchor_coef: NonNegative = 1.0,
    where: Array | None = None,
) -> Array:
    r"""OPA-DPO: a ground truth and an expert's revision, both above the model's answer.

    With $D(a, b) = -\log\sigma(R_a - R_b)$ of the rewards $R = \beta\sum_t w_t r_t$ of the five
    candidates ground truth g, revision v, original o, and g', v' after a masked image:
    $D(g, o) + c_v D(v, o) + c_i[D(g, g') + D(v, v')]$, and for each chosen reward of the four pairs
    an anchor $-c_a\log\sigma(R - \delta)$. Weights $w_t$ other than 1 are those of the revision's
    pairs: response scores beside o, image scores beside v'.

    Experimental: the composition is that of the authors' code, on whole sequences; the paper's
    equations were not seen.

    Args:
        policy_token_logps: `[..., 5, T]` log-probs of the completions' tokens in nats: g, v, o, g',
            v'.
        reference_token_logps: `[..., 5, T]` the same under the reference policy, the one tuned on
            ground truths and revisions.
        token_mask: `[..., 5, T]` bool, True on tokens of the completion.
        response_weights: `[..., 5, T]` weights of the tokens in D(v, o); 1 without.
        image_weights: `[..., 5, T]` weights of the tokens in D(v, v'); 1 without.
        beta: strength of the KL regularisation, > 0.
        revised_coef: weight of D(v, o), >= 0.
        copo_coef: weight of the two pairs of images, >= 0.
        anchor: reward in nats that chosen completions are pushed above.
        anchor_coef: weight of the anchors, >= 0.
        where: `[..., 5]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where any candidate is masked.

    >>> same, mask = jnp.full((5, 3), -1.0), jnp.ones((5, 3), bool)
    >>> opa_dpo_loss(same, same, mask, anchor_coef=0.0) / jnp.log(2.0)
    Array(2.4, dtype=float32)

    Yang et al. 2025, arXiv:2501.09695. The authors' code applies the logistic position by position,
    padding included, and its anchor pushes the revision *down*; neither is copied. TRL, EasyDeL and
    HALOs do not have it.
    """
    ratios, kept = token_log_ratios(
        policy_token_logps, reference_token_logps, token_mask, where, candidates=5
    )
    plain = _weighted_rewards(ratios, kept, None, beta)
    by_response = _weighted_rewards(ratios, kept, response_weights, beta)
    by_image = _weighted_rewards(ratios, kept, image_weights, beta)
    pairs = (
        (plain, 0, 2, 1.0),
        (by_response, 1, 2, revised_coef),
        (plain, 0, 3, copo_coef),
        (by_image, 1, 4, copo_coef),
    )
    loss = jnp.zeros((), ratios.dtype)
    for rewards, chosen, rejected, coef in pairs:
        loss += coef * jax.nn.softplus(rewards[..., rejected] - rewards[..., chosen])
        loss += anchor_coef * jax.nn.softplus(anchor - rewards[..., chosen])
    return masked_rows(loss, where)


def ofs_dpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    previous_logps: Array,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.1,
    module: Literal["fast", "slow"] = "fast",
    where: Array | None = None,
) -> Array:
    r"""Online fast-slow chasing DPO: DPO, and ahead of (or up to) a second policy.

    Two copies learn at different rates. The fast one minimises $-\log\sigma(\beta(r_w - r_l)) +
    \alpha L_{FS}$, the slow one the first term minus $\alpha L_{FS}$, with $L_{FS} =
    -\log\sigma(\beta(d_F - d_S))$ and $d = s_w - s_l$ of each: one runs away, one chases. The other
    policy is `previous_logps`, and has no gradient.

    Experimental: reconstructed from a third party's port to diffusion models that cites Eq. 3-6;
    the paper's equations were not seen, and the default of alpha is ours.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        previous_logps: `[..., 2]` the same under the other of the two policies.
        beta: strength of the KL regularisation, > 0.
        alpha: weight of the chase, >= 0; 0 is DPO.
        module: which of the two is trained.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> same = jnp.array([-5., -5.])
    >>> ofs_dpo_loss(same, same, same, alpha=1.0) / jnp.log(2.0)
    Array(2., dtype=float32)

    Qi et al. 2024, arXiv:2406.05534. No code of the authors; TRL, EasyDeL and HALOs do not have it.
    """
    loss = dpo_loss(policy_logps, reference_logps, beta=beta, where=where)
    other = jax.lax.stop_gradient(previous_logps)
    lead = beta * margin(pair_log_ratios(policy_logps, other, where))
    chase = jax.nn.softplus(-lead) if module == "fast" else -jax.nn.softplus(lead)
    return loss + masked_rows(alpha * chase, where)


def spo_degree_loss(
    policy_logps: Array,
    reference_logps: Array,
    degree_logits: Array,
    degree_labels: Array,
    *,
    beta: Positive = 0.1,
    weight: NonNegative = 1.0,
    where: Array | None = None,
) -> Array:
    r"""Self-supervised preference optimisation: DPO, and a head that tells degrees of preference.

    Plus `weight` times the cross-entropy of classifying how much of the key content was removed
    from a completion.

    Experimental: only that structure is public. Number of degrees, the head and the weight are
    yours to choose.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        degree_logits: `[..., M]` scores of M degrees, from a head.
        degree_labels: `[...]` the right degree, 0 to M - 1.
        beta: strength of the KL regularisation, > 0.
        weight: of the classification, >= 0; 0 is DPO.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> same, logits = jnp.array([-5., -5.]), jnp.zeros(4)
    >>> spo_degree_loss(same, same, logits, jnp.array(3)) / jnp.log(2.0)
    Array(3., dtype=float32)

    Li et al. 2024, arXiv:2409.17791. The authors' repository holds no code; TRL, EasyDeL and HALOs
    do not have it.
    """
    loss = dpo_loss(policy_logps, reference_logps, beta=beta, where=where)
    chex.assert_shape(degree_logits, (*loss.shape, None))
    chex.assert_shape(degree_labels, loss.shape)
    # Groups are masked whole: logits are of a group, not of a candidate.
    logits = at_least_float32(degree_logits)
    if where is not None:
        logits = masked(logits, valid_rows(where)[..., None])
    label = jax.nn.one_hot(degree_labels.astype(jnp.int32), logits.shape[-1], dtype=logits.dtype)
    cross_entropy = logsumexp(logits) - jnp.sum(label * logits, axis=-1)
    return loss + masked_rows(weight * cross_entropy, where)


def _weighted_rewards(ratios: Array, kept: Array, weights: Array | None, beta: float) -> Array:
    """`[..., K, T] -> [..., K]` implicit rewards, of weighted tokens if weights are given."""
    if weights is not None:
        chex.assert_equal_shape([ratios, weights])
        ratios = ratios * masked(at_least_float32(weights), kept)
    return beta * jnp.sum(ratios, axis=-1)
