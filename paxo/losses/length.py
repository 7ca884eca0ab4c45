r"""DPO that does not reward length: averaged, charged, drawn or discounted tokens.

A sum over more tokens moves further for the same change per token, so DPO prefers to learn from,
and towards, long completions.

>>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
>>> ln_dpo_loss(policy, reference, jnp.array([4, 4]), beta=2.0)  # DPO with beta 2/4
Array(0.3132617, dtype=float32)
"""

import jax
import jax.numpy as jnp

from paxo.losses.contract import Positive, Probability, Real, whole_batch
from paxo.losses.pairwise import check_candidates, margin, pair_log_ratios, token_log_ratios
from paxo.numerics import Array, at_least_float32, masked, masked_rows, safe_divide


def ln_dpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    lengths: Array,
    *,
    beta: Positive = 5.0,
    where: Array | None = None,
) -> Array:
    r"""Length-normalised DPO: $-\log\sigma(\beta(r_w/n_w - r_l/n_l))$.

    Log-ratios per token are of the order of 0.1, so beta wants to be some 10 to 100 times DPO's:
    with 0.1 the loss is nearly flat.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        lengths: `[..., 2]` scored tokens of each completion.
        beta: scale of the per-token reward, > 0; the default is that of Tulu 3's recipe.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> ln_dpo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), jnp.array([10, 5]), beta=1.)
    Array(0.5543552, dtype=float32)

    Ahrabian et al. 2024, arXiv:2407.15229, the formula as two notes on it print it; the same form
    is in SimPO's appendix and in Tulu 3 (open-instruct `dpo_norm`). TRL `sigmoid_norm` computes the
    same, by default with beta 0.1.
    """
    check_candidates(policy_logps, lengths)
    ratios = pair_log_ratios(policy_logps, reference_logps, where)
    rewards = safe_divide(ratios, masked(lengths, where))
    return masked_rows(jax.nn.softplus(-beta * margin(rewards)), where)


def r_dpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    lengths: Array,
    *,
    beta: Positive = 0.1,
    alpha: Real = 0.01,
    where: Array | None = None,
) -> Array:
    r"""R-DPO, regularised in length: $-\log\sigma(\beta(r_w - r_l) + \alpha(n_w - n_l))$.

    From a reward that charges α for each token. A chosen completion that is the longer one counts
    as ahead already, and has the *smaller* gradient.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        lengths: `[..., 2]` scored tokens of each completion.
        beta: strength of the KL regularisation, > 0.
        alpha: charge in nats per token; 0 is DPO. 0.01 is SamPO's baseline; SimPO's tries 0.05 to
            1.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> policy, reference = jnp.array([-4., -6.]), jnp.array([-5., -5.])
    >>> r_dpo_loss(policy, reference, jnp.array([10, 20]), beta=0.5, alpha=0.1)
    Array(0.6931472, dtype=float32)

    Park et al. 2024, arXiv:2403.19159; the equation is from memory, its sign derived from the
    charged reward, and as in SamPO's code. oxRL has the opposite sign. TRL, EasyDeL and HALOs do
    not have it.
    """
    check_candidates(policy_logps, lengths)
    z = beta * margin(pair_log_ratios(policy_logps, reference_logps, where))
    longer = margin(masked(at_least_float32(lengths), where))
    return masked_rows(jax.nn.softplus(-(z + alpha * longer)), where)


# A draw depends on the place in the batch. Marked, so that the whole batch is drawn for at once:
# microbatches and devices then give the same loss.
@whole_batch
def sampo_loss(
    policy_token_logps: Array,
    reference_token_logps: Array,
    token_mask: Array,
    *,
    beta: Positive = 0.1,
    key: Array,
    where: Array | None = None,
) -> Array:
    r"""SamPO: DPO on as many tokens of each completion, $T_m = \min(n_w, n_l)$ drawn at random.

    Policy and reference are compared at the same tokens. The shorter completion keeps all of its
    own; a log-ratio of the longer one is $r\,T_m/n$ on average.

    Args:
        policy_token_logps: `[..., 2, T]` log-probs of the completions' tokens in nats, chosen
            first.
        reference_token_logps: `[..., 2, T]` the same under the reference policy.
        token_mask: `[..., 2, T]` bool, True on tokens of the completion.
        beta: strength of the KL regularisation, > 0.
        key: random key of the draw.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> policy, reference = jnp.array([[-4., 0.], [-6., -9.]]), jnp.array([[-5., 0.], [-5., -8.]])
    >>> mask = jnp.array([[True, False], [True, True]])
    >>> sampo_loss(policy, reference, mask, beta=0.5, key=jax.random.key(0))
    Array(0.3132617, dtype=float32)

    Lu et al. 2024, arXiv:2406.10957. The authors' code draws tokens for policy and reference
    independently, so that its ratio subtracts different tokens; this follows the paper. TRL,
    EasyDeL and HALOs do not have it.
    """
    ratios, kept = token_log_ratios(policy_token_logps, reference_token_logps, token_mask, where)
    shared = jnp.min(jnp.sum(kept, axis=-1), axis=-1)[..., None, None]
    lots = jnp.where(kept, jax.random.uniform(key, kept.shape), jnp.inf)
    drawn = jnp.argsort(jnp.argsort(lots, axis=-1), axis=-1) < shared
    rewards = beta * jnp.sum(masked(ratios, drawn), axis=-1)
    return masked_rows(jax.nn.softplus(-margin(rewards)), where)


def ld_dpo_loss(
    policy_token_logps: Array,
    reference_token_logps: Array,
    token_mask: Array,
    *,
    beta: Positive = 0.1,
    alpha: Probability = 0.5,
    where: Array | None = None,
) -> Array:
    r"""LD-DPO: DPO that discounts the tokens beyond the shorter completion's length.

    $-\log\sigma(\beta(\tilde r_w - \tilde r_l))$ with $\tilde r = \sum_{t \le l} r_t +
    \alpha\sum_{t > l} r_t$ and $l = \min(n_w, n_l)$: only the longer completion has such tokens.

    Args:
        policy_token_logps: `[..., 2, T]` log-probs of the completions' tokens in nats, chosen
            first.
        reference_token_logps: `[..., 2, T]` the same under the reference policy.
        token_mask: `[..., 2, T]` bool, True on tokens of the completion.
        beta: strength of the KL regularisation, > 0.
        alpha: weight of the excess tokens, in [0, 1]; 1 is DPO, 0 ignores them.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> policy, reference = jnp.array([[-4., -2.], [-6., 0.]]), jnp.array([[-5., -4.], [-5., 0.]])
    >>> mask = jnp.array([[True, True], [True, False]])
    >>> ld_dpo_loss(policy, reference, mask, beta=0.5, alpha=0.)
    Array(0.3132617, dtype=float32)

    Liu et al. 2024, arXiv:2409.06411; the equation as TRL's paper index has it. TRL's `ld_alpha` is
    the same since early 2026; before, as in LLaMA-Factory and ms-swift, it discounted the policy's
    tokens only, whose margin is then not 0 at the reference.
    """
    ratios, kept = token_log_ratios(policy_token_logps, reference_token_logps, token_mask, where)
    shared = jnp.min(jnp.sum(kept, axis=-1), axis=-1)[..., None, None]
    excess = jnp.cumsum(kept, axis=-1) > shared
    rewards = beta * jnp.sum(jnp.where(excess, alpha * ratios, ratios), axis=-1)
    return masked_rows(jax.nn.softplus(-margin(rewards)), where)
