r"""Losses of the KL-regularised preference game: the live policy takes one step per batch.

The game: $\max_\pi \min_{\pi'} P(\pi\succ\pi') - \tau\,KL(\pi|q) + \tau\,KL(\pi'|q)$ with the
reference $q$; its solution is the regularised Nash policy. A judge says $P(y\succ y')$ in [0, 1].
All losses regress the margin of the log-ratios $h = \log\pi - \log q$ on a margin of judgements;
they differ in who is sampled and who is the opponent, which is the business of the sampler. What a
judge, a frozen policy or a sampler gave is data here: no gradient goes through it.

>>> policy, reference = jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0])
>>> nash = reference + jnp.array([0.75, 0.25]) / 0.5      # log-ratios equal win rates over beta
>>> win_rates = jnp.array([0.75, 0.25])
>>> [float(online_ipo_v1_loss(s, reference, win_rates, beta=0.5)) for s in (policy, nash)]
[1.0, 0.0]
"""

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import NonNegative, Positive
from paxo.losses.given import candidate_mean, check_lists, check_pairs, given, ratios_to
from paxo.losses.pairwise import margin
from paxo.numerics import Array, at_least_float32, masked, masked_rows, safe_divide


def online_ipo_v1_loss(
    policy_logps: Array,
    reference_logps: Array,
    win_rates: Array,
    lengths: Array | None = None,
    *,
    beta: Positive = 0.1,
    length_normalize: bool = False,
    where: Array | None = None,
) -> Array:
    r"""Online mirror descent and EGPO: $(h(y) - h(y') - (w(y) - w(y'))/\beta)^2$.

    $w(y) = P(y \succ y'')$ against an opponent $y''$: the live policy for online mirror descent;
    for EGPO first the live policy, then, from the same parameters, the policy half a step ahead.
    The pair $y, y'$ comes from a fixed distribution with full support. In a tabular game of N
    actions and uniform pairs, gradient descent at rate `lr` is mirror descent at step
    $\eta = 4\,lr/(\beta N)$.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats.
        reference_logps: `[..., 2]` the same under the reference policy.
        win_rates: `[..., 2]` in [0, 1], how often each beats the opponent.
        lengths: `[..., 2]` scored tokens; needed for `length_normalize` only.
        beta: KL weight of the game, > 0.
        length_normalize: divide each log-ratio by its tokens, as EGPO's language-model code does
            against its paper; beta then scales with the length.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats squared. 0 where either candidate is masked.

    >>> s, q = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
    >>> online_ipo_v1_loss(s, q, jnp.array([0.75, 0.25]), beta=0.25)
    Array(0., dtype=float32)

    Zhou et al. 2025, arXiv:2503.08942, in which it is "online IPO 1", and the authors' code. TRL,
    EasyDeL and HALOs have nothing of the kind.
    """
    check_pairs(policy_logps, reference_logps, win_rates, where)
    target = margin(given(win_rates, where)) / beta
    ratios = _ratios(policy_logps, reference_logps, lengths, length_normalize, where)
    return masked_rows(jnp.square(margin(ratios) - target), where)


def online_ipo_v2_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    lengths: Array | None = None,
    *,
    beta: Positive = 0.1,
    length_normalize: bool = False,
    where: Array | None = None,
) -> Array:
    r"""Self-play regression: $(h(y) - h(y') - (P(y\succ y') - 1/2)/\beta)^2$.

    Both completions come from the live policy and are each other's opponent. The stationary points
    are those of `online_ipo_v1`, but a step follows the policy gradient of the game: actions that
    are rare under the policy move slowly.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats.
        reference_logps: `[..., 2]` the same under the reference policy.
        labels: `[..., 2]` how often each beats the other, `(p, 1 - p)`; `(1, 0)` for a hard label.
        lengths: `[..., 2]` scored tokens; needed for `length_normalize` only.
        beta: KL weight of the game, > 0.
        length_normalize: divide each log-ratio by its tokens, as EGPO's language-model code does.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats squared. 0 where either candidate is masked.

    >>> s, q = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
    >>> online_ipo_v2_loss(s, q, jnp.array([0.75, 0.25]), beta=0.125)
    Array(0., dtype=float32)

    Zhou et al. 2025, arXiv:2503.08942, "online IPO 2". Same gradient as `online_ipo` at tau = beta.
    """
    check_pairs(policy_logps, reference_logps, labels, where)
    target = margin(given(labels, where)) / (2 * beta)
    ratios = _ratios(policy_logps, reference_logps, lengths, length_normalize, where)
    return masked_rows(jnp.square(margin(ratios) - target), where)


def online_ipo_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    tau: Positive = 1.0,
    where: Array | None = None,
) -> Array:
    r"""IPO on the live policy's own pairs: $p(D - 1/2\tau)^2 + (1-p)(D + 1/2\tau)^2$.

    $D = h(y) - h(y')$ and $p = P(y\succ y')$, a drawn label or the judge's probability: the soft
    label is the mean of the hard ones. With both completions drawn from the live policy its mean
    gradient is $-4/\tau$ times that of the game's self-play objective.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats.
        reference_logps: `[..., 2]` the same under the reference policy.
        labels: `[..., 2]` how often each beats the other, `(p, 1 - p)`; `(1, 0)` for a hard label.
        tau: KL weight of the game, > 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats squared. 0 where either candidate is masked.

    >>> s, q = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
    >>> online_ipo_loss(s, q, jnp.array([0.75, 0.25]), tau=0.5)
    Array(3., dtype=float32)

    Calandriello et al. 2024, arXiv:2403.08635 (formula from secondary sources; the gradient is
    derived). TRL's OnlineDPOTrainer with `loss_type="ipo"` is the case of hard labels.
    """
    check_pairs(policy_logps, reference_logps, labels, where)
    margins = margin(ratios_to(policy_logps, reference_logps, where))
    p = (1 + margin(given(labels, where))) / 2
    target = 1 / (2 * tau)
    loss = p * jnp.square(margins - target) + (1 - p) * jnp.square(margins + target)
    return masked_rows(loss, where)


def ipo_md_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    tau: Positive = 1.0,
    where: Array | None = None,
) -> Array:
    r"""IPO-MD: `online_ipo` on pairs drawn from the mixture $\pi^{1-\mu} q^{\mu}$.

    The mixture is geometric, normalised token by token, and the sampler's business (the paper's
    $\mu$ is 0.125). At a stationary point the mixture is the Nash policy of the game with KL weight
    $\tau/(1-\mu)$.

    Args:
        policy_logps: `[..., 2]` summed log-probs, in nats, of completions drawn from the mixture.
        reference_logps: `[..., 2]` the same under the reference policy.
        labels: `[..., 2]` how often each beats the other, `(p, 1 - p)`; `(1, 0)` for a hard label.
        tau: KL weight, > 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats squared. 0 where either candidate is masked.

    >>> ipo_md_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), jnp.array([1., 0.]), tau=0.25)
    Array(0., dtype=float32)

    Calandriello et al. 2024, arXiv:2403.08635 (from secondary sources). No library has it.
    """
    return online_ipo_loss(policy_logps, reference_logps, labels, tau=tau, where=where)


def nash_md_loss(
    policy_logps: Array,
    reference_logps: Array,
    win_rates: Array,
    lengths: Array | None = None,
    *,
    beta: Positive = 0.1,
    length_normalize: bool = False,
    where: Array | None = None,
) -> Array:
    r"""Nash-MD as a regression: `online_ipo_v1` against the mixture $\pi^{1-\mu}q^{\mu}$.

    With $\mu = \eta\beta$ a tabular step at rate $lr = \eta\beta N/4$ is Nash-MD's
    $\pi^+ \propto \pi_\mu \exp(\eta P(\cdot\succ\pi_\mu))$, $\pi_\mu$ the mixture. With a constant
    mixture it does not reach the Nash policy: the mixture reaches that of KL weight
    $\beta/(1-\mu)$.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats.
        reference_logps: `[..., 2]` the same under the reference policy.
        win_rates: `[..., 2]` in [0, 1], how often each beats a completion of the mixture.
        lengths: `[..., 2]` scored tokens; needed for `length_normalize` only.
        beta: KL weight of the game, > 0.
        length_normalize: divide each log-ratio by its tokens, as EGPO's language-model code does.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats squared. 0 where either candidate is masked.

    >>> nash_md_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), jnp.array([.6, .4]), beta=0.1)
    Array(0., dtype=float32)

    Munos et al. 2023, arXiv:2312.00886 (from secondary sources), in the regression form of Zhou et
    al. 2025. TRL's and EasyDeL's Nash-MD trainers are policy gradients: see `nash_md_pg`.
    """
    return online_ipo_v1_loss(
        policy_logps,
        reference_logps,
        win_rates,
        lengths,
        beta=beta,
        length_normalize=length_normalize,
        where=where,
    )


def nash_md_pg_loss(
    policy_logps: Array,
    reference_logps: Array,
    win_rates: Array,
    *,
    tau: NonNegative = 0.008,
    where: Array | None = None,
) -> Array:
    r"""Nash-MD by policy gradient: $-(P(y\succ y') - 1/2 - \tau\,\mathrm{sg}[h(y)])\log\pi(y)$.

    $y$ comes from the live policy and $y'$ from the mixture $\pi^{1-\mu}q^{\mu}$ (paper: $\mu$ =
    0.125). The mean gradient is that of $-P(\pi\succ\pi_\mu) + \tau KL(\pi|q)$; the 1/2 is a
    baseline. The log-ratio is that of the whole completion, and no gradient goes through it: the
    score $\nabla\log\pi(y)$ of a completion is weighed with all of it.

    Args:
        policy_logps: `[..., K]` summed log-probs, in nats, of completions drawn from the policy.
        reference_logps: `[..., K]` the same under the reference policy.
        win_rates: `[..., K]` in [0, 1], how often each beats completions of the mixture.
        tau: KL weight of the game, >= 0.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` mean over the candidates; its gradient counts, its value does not. 0 without any.

    >>> nash_md_pg_loss(jnp.array([-4.0]), jnp.array([-5.0]), jnp.array([1.0]), tau=0.25)
    Array(1., dtype=float32)

    Munos et al. 2023, arXiv:2312.00886 (from secondary sources). TRL's trainer (up to 1.13) weighs
    each token's log-prob with its own log-ratio only, a biased gradient of the KL, and is this for
    one token; EasyDeL's forgets the stop-gradient too, and mixes completions, not distributions.
    """
    check_lists(policy_logps, reference_logps, win_rates, where)
    logps = masked(at_least_float32(policy_logps), where)
    ratios = jax.lax.stop_gradient(logps) - given(reference_logps, where)
    advantages = given(win_rates, where) - 0.5 - tau * ratios
    return candidate_mean(-advantages * logps, where)


def _ratios(policy_logps, fixed_logps, lengths, length_normalize, where):
    """Policy minus a frozen policy, for each completion or for each of its tokens."""
    ratios = ratios_to(policy_logps, fixed_logps, where)
    if not length_normalize:
        return ratios
    if lengths is None:
        raise ValueError("length_normalize=True needs `lengths [..., 2]`, the scored tokens")
    chex.assert_equal_shape([policy_logps, lengths])
    return safe_divide(ratios, masked(lengths, where))
