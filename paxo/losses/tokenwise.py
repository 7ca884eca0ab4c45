r"""Losses on log-probs token by token, `[..., 2, T]`, chosen first.

`token_kls` are $KL(\pi_{ref} \| \pi)$ of whole next-token distributions, in nats, at each scored
position. Log-ratios are formed per token and then summed: the sum of small differences keeps digits
that the difference of large sums has lost.

>>> policy = jnp.array([[-1.0, -2.0], [-3.0, -3.0]])
>>> token_dpo_loss(policy, policy, jnp.ones((2, 2), bool))
Array(0.6931472, dtype=float32)
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import NonNegative, Positive, Probability
from paxo.losses.pairwise import log_ratios, margin, token_log_ratios
from paxo.numerics import Array, Mean, at_least_float32, masked, masked_rows


def token_dpo_loss(
    policy_token_logps: Array,
    reference_token_logps: Array,
    token_mask: Array,
    *,
    beta: Positive = 0.1,
    where: Array | None = None,
) -> Array:
    r"""DPO in the token MDP: $-\log\sigma(\sum_t A_{w,t} - \sum_t A_{l,t})$.

    $A_t = \beta\log(\pi/\pi_{ref})(y_t)$. The loss is DPO's; what differs is the reading. At its
    optimum $\beta\log\pi(y_t) = Q^*(s_t, y_t) - V^*(s_t)$ with the soft $Q^*$ and $V^*$ of the
    reward, and $A_t = r_t + V^*(s_{t+1}) - V^*(s_t)$: the credit of each token (`token_rewards`).

    Args:
        policy_token_logps: `[..., 2, T]` log-probs of the completions' tokens in nats.
        reference_token_logps: `[..., 2, T]` the same under the reference policy.
        token_mask: `[..., 2, T]` bool, True on scored tokens.
        beta: strength of the KL regularisation, > 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; 0 where a candidate is masked.

    >>> policy, reference = jnp.array([[-1.], [-3.]]), jnp.array([[-2.], [-2.]])
    >>> token_dpo_loss(policy, reference, jnp.ones((2, 1), bool), beta=0.5)
    Array(0.3132617, dtype=float32)

    Rafailov et al. 2024, arXiv:2404.12358. Equal to `dpo` up to rounding, and so
    to TRL's, EasyDeL's and HALOs' DPO.
    """
    ratios, _ = token_log_ratios(policy_token_logps, reference_token_logps, token_mask, where)
    return masked_rows(jax.nn.softplus(-beta * margin(jnp.sum(ratios, axis=-1))), where)


def token_rewards(
    policy_token_logps: Array, reference_token_logps: Array, token_mask: Array, *, beta: float
) -> Array:
    r"""`[..., K, T]` $\beta\log(\pi/\pi_{ref})(y_t)$, the implicit advantage of each token.

    At DPO's optimum they add up along a completion to its reward minus the prompt's soft value.
    0 where masked.

    >>> token_rewards(jnp.array([-1., -2.]), jnp.array([-2., -2.]), jnp.ones(2, bool), beta=0.5)
    Array([0.5, 0. ], dtype=float32)
    """
    return beta * log_ratios(policy_token_logps, reference_token_logps, token_mask)


def tdpo1_loss(
    policy_token_logps: Array,
    reference_token_logps: Array,
    token_kls: Array,
    token_mask: Array,
    *,
    beta: Positive = 0.1,
    where: Array | None = None,
) -> Array:
    r"""Token-level DPO, first form: $-\log\sigma(\beta(U_w - U_l) - \beta(K_l - K_w))$.

    $U$ sums the tokens' log-ratios and $K$ the divergences from the reference along a completion:
    the exact Bradley-Terry model of the token MDP keeps the latter, which DPO drops.

    Args:
        policy_token_logps: `[..., 2, T]` log-probs of the completions' tokens in nats.
        reference_token_logps: `[..., 2, T]` the same under the reference policy.
        token_kls: `[..., 2, T]` KL(reference to policy) at each position in nats, >= 0.
        token_mask: `[..., 2, T]` bool, True on scored tokens.
        beta: strength of the KL regularisation, > 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> same, kls = jnp.zeros((2, 1)), jnp.array([[1.], [3.]])
    >>> tdpo1_loss(same, same, kls, jnp.ones((2, 1), bool), beta=0.5)
    Array(1.3132617, dtype=float32)

    Zeng et al. 2024, arXiv:2404.11999; code Vance0124/Token-level-DPO, whose README command for
    TDPO2 trains this form. It takes the log of the reference's softmax, here log_softmax.
    """
    ratios, kls = _sums(policy_token_logps, reference_token_logps, token_kls, token_mask, where)
    return masked_rows(jax.nn.softplus(-beta * margin(ratios + kls)), where)


def tdpo2_loss(
    policy_token_logps: Array,
    reference_token_logps: Array,
    token_kls: Array,
    token_mask: Array,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.5,
    where: Array | None = None,
) -> Array:
    r"""Token-level DPO, second form: $-\log\sigma(\beta(U_w - U_l) - \alpha\beta(K_l - sg[K_w]))$.

    As `tdpo1_loss` with the divergences weighed by alpha, and no gradient through the chosen one:
    it is a baseline, not something to be raised.

    Args:
        policy_token_logps: `[..., 2, T]` log-probs of the completions' tokens in nats.
        reference_token_logps: `[..., 2, T]` the same under the reference policy.
        token_kls: `[..., 2, T]` KL(reference to policy) at each position in nats, >= 0.
        token_mask: `[..., 2, T]` bool, True on scored tokens.
        beta: strength of the KL regularisation, > 0.
        alpha: weight of the divergences, >= 0; 0 is DPO.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> same, kls = jnp.zeros((2, 1)), jnp.array([[1.], [3.]])
    >>> tdpo2_loss(same, same, kls, jnp.ones((2, 1), bool), beta=1.0)
    Array(1.3132617, dtype=float32)

    Zeng et al. 2024, arXiv:2404.11999; code Vance0124/Token-level-DPO with `if_tdpo2=true`.
    """
    ratios, kls = _sums(policy_token_logps, reference_token_logps, token_kls, token_mask, where)
    kl_margin = jax.lax.stop_gradient(kls[..., 0]) - kls[..., 1]
    return masked_rows(jax.nn.softplus(-beta * (margin(ratios) + alpha * kl_margin)), where)


def sparse_po_loss(
    policy_token_logps: Array,
    reference_token_logps: Array,
    token_kls: Array,
    token_mask: Array,
    token_weights: Array,
    kl_token_weights: Array | None = None,
    *,
    beta: Positive = 0.1,
    l1_u: NonNegative = 0.0,
    l1_d: NonNegative = 0.0,
    mask_type: Literal["learned", "activations"] = "learned",
    where: Array | None = None,
) -> Array:
    r"""SparsePO: TDPO with a weight on each token's log-ratio and divergence.

    $-\log\sigma(\beta(u_w - u_l + d_w - d_l)) + \lambda_u\|w_u\|_1 + \lambda_d\|w_d\|_1$ with
    $u = \sum_t w_{u,t} r_t$ and $d = \sum_t w_{d,t} KL_t$; the norms run over the tokens of both
    candidates. With one set of weights for both (`kl_token_weights` None) $w_d = w_u$.

    "learned" weights are the output of a head, cut at 0 so that exact zeros arise. "activations"
    (MaPO) is fixed: `token_weights` are mean activations of the reference, scaled to [0, 1] within
    each completion (the published z-score before it changes nothing), without gradient.

    Args:
        policy_token_logps: `[..., 2, T]` log-probs of the completions' tokens in nats.
        reference_token_logps: `[..., 2, T]` the same under the reference policy.
        token_kls: `[..., 2, T]` KL(reference to policy) at each position in nats, >= 0.
        token_mask: `[..., 2, T]` bool, True on scored tokens.
        token_weights: `[..., 2, T]` output of the head, or mean activations. The paper mixes linear
            maps of the reference's hidden states of all layers; the head sees the last layer.
        kl_token_weights: `[..., 2, T]` the same for the divergences; None for common weights.
        beta: strength of the KL regularisation, > 0.
        l1_u: weight of the L1 norm of the log-ratios' weights, >= 0; 0.001 in the HH runs.
        l1_d: the same for the divergences' weights (with common weights both norms are added).
        mask_type: "learned" or "activations".
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; 0 where a candidate is masked.

    >>> same, kls, ones = jnp.zeros((2, 1)), jnp.array([[1.], [3.]]), jnp.ones((2, 1))
    >>> sparse_po_loss(same, same, kls, ones > 0, ones, beta=0.5)
    Array(1.3132617, dtype=float32)

    Christopoulou et al. 2024, arXiv:2410.05102; formula from the authors' code (huawei-noah/HEBO,
    SparsePO), whose `chosen_token_kl` is minus the divergence. No other trainer has it.
    """
    if kl_token_weights is None:
        kl_token_weights = token_weights
    chex.assert_equal_shape([token_mask, token_kls, token_weights, kl_token_weights])
    ratios, kept = token_log_ratios(policy_token_logps, reference_token_logps, token_mask, where)
    for_ratios = _weights(token_weights, kept, mask_type)
    for_kls = _weights(kl_token_weights, kept, mask_type)
    weighted = for_ratios * ratios + for_kls * masked(at_least_float32(token_kls), kept)
    loss = jax.nn.softplus(-beta * margin(jnp.sum(weighted, axis=-1)))
    norms = l1_u * jnp.sum(for_ratios, axis=(-2, -1)) + l1_d * jnp.sum(for_kls, axis=(-2, -1))
    return masked_rows(loss + norms, where)


def d3po_loss(
    policy_token_logps: Array,
    reference_token_logps: Array,
    token_mask: Array,
    labels: Array,
    *,
    beta: Positive = 0.1,
    epsilon: Probability = 0.1,
    where: Array | None = None,
) -> Mean:
    r"""DPO at every step of a denoising trajectory: $-\log\sigma(\beta(h_0 d_0 + h_1 d_1))$.

    $d$ is a step's log-ratio, cut to $[\log(1-\epsilon), \log(1+\epsilon)]$, and $h = \pm 1$ says
    which trajectory was preferred. A tie has $h = 0$: log 2 and no gradient. The cut is hard: past
    it there is no gradient even where the ratio moved the wrong way. Average over all steps.

    Args:
        policy_token_logps: `[..., 2, T]` log-probs of the steps in nats: summed over a step's
            dimensions (the authors' code takes their mean, which divides beta by that number).
        reference_token_logps: `[..., 2, T]` the same under the policy that made the trajectories.
        token_mask: `[..., 2, T]` bool; a step counts where both trajectories have it.
        labels: `[..., 2]` grades; only which is the higher matters.
        beta: strength of the KL regularisation, > 0.
        epsilon: half-width of the clipped ratio, in [0, 1].
        where: `[..., 2]` bool, False on trajectories to ignore.

    Returns:
        A `Mean` of nats over steps.

    >>> policy, reference = jnp.array([[-1.0], [-1.0]]), jnp.array([[-1.05], [-0.95]])
    >>> ones, labels = jnp.ones((2, 1), bool), jnp.array([1.0, 0.0])
    >>> d3po_loss(policy, reference, ones, labels, beta=1.0).value
    Array(0.6443967, dtype=float32)

    Yang et al. 2023, arXiv:2311.13231 (number from memory; the clip is the authors' code's).
    Diffusion-DPO is `dpo` on log-ratios $-(e - e_{ref})/2$ of denoising errors.
    """
    ratios, kept = token_log_ratios(policy_token_logps, reference_token_logps, token_mask, where)
    both = jnp.all(kept, axis=-2)
    low, high = jnp.log1p(jnp.asarray([-epsilon, epsilon], ratios.dtype))
    clipped = jnp.clip(ratios, low, high)
    grades = masked(at_least_float32(labels), where)
    sign = jnp.sign(margin(grades)).astype(ratios.dtype)[..., None]
    steps = jax.nn.softplus(-beta * sign * (clipped[..., 0, :] - clipped[..., 1, :]))
    return Mean.over(steps, both)


def _sums(
    policy_token_logps: Array,
    reference_token_logps: Array,
    token_kls: Array,
    token_mask: Array,
    where: Array | None,
) -> tuple[Array, Array]:
    """`[..., 2]` each: U and K, the sums of log-ratios and of divergences."""
    chex.assert_equal_shape([token_mask, token_kls])
    ratios, kept = token_log_ratios(policy_token_logps, reference_token_logps, token_mask, where)
    kls = masked(at_least_float32(token_kls), kept)
    return jnp.sum(ratios, axis=-1), jnp.sum(kls, axis=-1)


def _weights(weights: Array, kept: Array, mask_type: str) -> Array:
    """Weights >= 0, and 0 where masked."""
    weights = masked(at_least_float32(weights), kept)
    if mask_type == "learned":
        return jax.nn.relu(weights)
    weights = jax.lax.stop_gradient(weights)
    low = jnp.min(weights, axis=-1, keepdims=True, where=kept, initial=jnp.inf)
    high = jnp.max(weights, axis=-1, keepdims=True, where=kept, initial=-jnp.inf)
    spread = jnp.where(high > low, high - low, 1)
    return masked((weights - low) / spread, kept)
