r"""CGPO: judges that a completion must pass, in three ways to train on it.

Every judge says whether a constraint holds. A completion that fails one has reward 0 for the policy
gradient (`cgpo_crpg_loss`), can only be the rejected one of a pair (`cgpo_codpo_loss`), or is not
imitated (`cgpo_crraft_loss`). Each task has its own judges and its own bound on the KL; gradients
of tasks are averaged by `weighted_sum` or by the mixture of the data.

>>> passed = passes_all(jnp.array([[1, 1], [1, 0]]))           # two completions, two judges
>>> cgpo_rewards(jnp.ones(2), jnp.ones(2), jnp.array([5.0, 5.0]), passed, kl_max=10.0)
Array([0.25, 0.  ], dtype=float32)
"""

import jax
import jax.numpy as jnp

from paxo.losses.contract import NonNegative, Positive, whole_batch
from paxo.losses.given import check_lists, given
from paxo.losses.pairwise import log_ratios
from paxo.losses.ranking import best_candidate
from paxo.numerics import Array, Mean, at_least_float32, masked, safe_divide


def calibrated_rewards(rewards: Array, baseline_rewards: Array) -> Array:
    r"""$\sigma(r(y) - r(\bar y))$ in (0, 1), without gradient: comparable across prompts.

    Args:
        rewards: `[..., K]` of the completions, as a Bradley-Terry model gives them.
        baseline_rewards: of a baseline answer to the same prompt, `[..., K]`, or `[..., 1]`.

    >>> calibrated_rewards(jnp.array([1.0, 3.0]), jnp.array([1.0]))
    Array([0.5      , 0.8807971], dtype=float32)

    Xu et al. 2024, arXiv:2409.20370.
    """
    return jax.nn.sigmoid(given(rewards) - given(baseline_rewards))


def cgpo_rewards(
    rewards: Array,
    baseline_rewards: Array,
    log_ratios: Array,
    passed: Array,
    *,
    kl_max: float,
    where: Array | None = None,
) -> Array:
    r"""`[..., K]` $\max(1 - h(y)/KL_{max}, 0)\,\sigma(r(y) - r(\bar y))$, 0 unless all judges pass.

    Args:
        rewards: `[..., K]` of the completions.
        baseline_rewards: `[..., K]` or `[..., 1]` of a baseline answer.
        log_ratios: `[..., K]` h, policy to reference, in nats.
        passed: `[..., K]` above 0.5 where all judges pass the completion (`passes_all`).
        kl_max: bound on the log-ratio, > 0, each task's own.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[..., K]` in [0, 1 - h/KL_max], without gradient; 0 where masked.

    Xu et al. 2024, arXiv:2409.20370. The text wants all judges to pass; Algorithm 1 prints "or".
    """
    check_lists(rewards, log_ratios, passed, where)
    there = jnp.ones(rewards.shape, bool) if where is None else where
    base = masked(jnp.broadcast_to(baseline_rewards, rewards.shape), there)
    left = jax.nn.relu(1 - given(log_ratios, there) / kl_max)
    kept = there & (passed > 0.5)
    return masked(left * calibrated_rewards(masked(rewards, there), base), kept)


def passes_all(judgements: Array) -> Array:
    """`[..., K, J] -> [..., K]` 1 where all J judges pass a completion (above 0.5), else 0.

    >>> passes_all(jnp.array([[1.0, 1.0], [1.0, 0.0]]))
    Array([1., 0.], dtype=float32)
    """
    return jnp.all(judgements > 0.5, axis=-1).astype(jnp.float32)


@whole_batch
def cgpo_crpg_loss(
    policy_logps: Array,
    reference_logps: Array,
    rewards: Array,
    baseline_rewards: Array,
    passed: Array,
    *,
    kl_max: Positive = 100.0,
    where: Array | None = None,
) -> Mean:
    r"""CRPG, calibrated regularised policy gradient: $-(\tilde R(y) - \bar R)\log\pi(y)$.

    $\tilde R = \max(1 - h/KL_{max}, 0)\,\sigma(r(y) - r(\bar y))$ for completions that all judges
    pass, 0 for others; $\bar R$ is its mean over the batch. For fresh samples of the policy; no
    gradient goes through the rewards or the log-ratio $h$ in them.

    Args:
        policy_logps: `[..., K]` summed log-probs, in nats, of completions of the policy itself.
        reference_logps: `[..., K]` the same under the reference policy.
        rewards: `[..., K]` of the completions.
        baseline_rewards: `[..., K]` of a baseline answer to the same prompt, the same for all K.
        passed: `[..., K]` above 0.5 where all judges pass the completion (`passes_all`).
        kl_max: log-ratio in nats at which nothing is left of the reward, > 0; each task's own in
            the paper, the default is ours.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over completions; its gradient counts, its value does not.

    >>> logps, passed = jnp.array([[-4.0, -6.0]]), jnp.array([[1.0, 0.0]])
    >>> same = jnp.zeros((1, 2))
    >>> jax.grad(lambda s: cgpo_crpg_loss(s, logps, same, same, passed).total)(logps)
    Array([[-0.25,  0.25]], dtype=float32)

    Xu et al. 2024, arXiv:2409.20370, whose Eq. 15 has the sign of a descent on an objective that is
    to be raised. No trainer has it.
    """
    check_lists(policy_logps, reference_logps, rewards, baseline_rewards, passed, where)
    there = jnp.ones(policy_logps.shape, bool) if where is None else where
    drift = log_ratios(policy_logps, reference_logps, there)
    found = cgpo_rewards(rewards, baseline_rewards, drift, passed, kl_max=kl_max, where=there)
    advantages = (found - Mean.over(found, there).value).astype(drift.dtype)
    logps = masked(at_least_float32(policy_logps), there)
    return Mean.over(-jax.lax.stop_gradient(advantages) * logps, there)


def cgpo_codpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    lengths: Array,
    rewards: Array,
    passed: Array,
    *,
    beta: Positive = 0.1,
    lam: NonNegative = 1.0,
    where: Array | None = None,
) -> Mean:
    r"""CODPO, constrained online DPO: $-\log\sigma(\beta(r_w - r_l)) - \lambda\log\pi(y_w)/n_w$.

    The chosen completion w is the best of those that pass all judges, the rejected l the worst of
    those that fail one.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        lengths: `[..., K]` scored tokens of each completion.
        rewards: `[..., K]` of the completions; only their order counts.
        passed: `[..., K]` above 0.5 where all judges pass the completion (`passes_all`).
        beta: strength of the KL regularisation, > 0 (our default).
        lam: weight of the likelihood of the chosen, >= 0 (our default).
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` in nats over the groups that hold both a passing and a failing completion.

    >>> policy, reference = jnp.array([-4.0, -6.0, -1.0]), jnp.full(3, -5.0)
    >>> rewards, passed = jnp.array([2.0, 3.0, 1.0]), jnp.array([1.0, 0.0, 1.0])
    >>> cgpo_codpo_loss(policy, reference, jnp.ones(3), rewards, passed, beta=0.5, lam=0.0).value
    Array(0.3132617, dtype=float32)

    Xu et al. 2024, arXiv:2409.20370. The likelihood term has the sign that raises log pi(y_w), as
    the text means it. On a given pair it is `rpo` with `nll_reduction="sequence_mean"`.
    """
    check_lists(policy_logps, reference_logps, lengths, rewards, passed, where)
    there = jnp.ones(policy_logps.shape, bool) if where is None else where
    good, grades = there & (passed > 0.5), given(rewards, there)
    bad = there & ~good
    chosen, rejected = best_candidate(grades, good), best_candidate(-grades, bad)
    ratios = log_ratios(policy_logps, reference_logps, there)
    logps = masked(at_least_float32(policy_logps), there)
    means = safe_divide(logps, masked(lengths, there))
    of = lambda x, place: jnp.sum(masked(x, place), axis=-1)  # noqa: E731
    loss = jax.nn.softplus(-beta * (of(ratios, chosen) - of(ratios, rejected)))
    both = jnp.any(good, axis=-1) & jnp.any(bad, axis=-1)
    return Mean.over(loss - lam * of(means, chosen), both)


def cgpo_crraft_loss(
    policy_logps: Array,
    rewards: Array,
    baseline_rewards: Array,
    passed: Array,
    *,
    where: Array | None = None,
) -> Mean:
    r"""CRRAFT, calibrated reward-ranking fine-tuning: $-\sigma(r(y) - r(\bar y))\log\pi(y)$.

    $y$ is the best completion of a group that passes all judges; the others are thrown away.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        rewards: `[..., K]` of the completions.
        baseline_rewards: `[..., K]` of a baseline answer to the same prompt, the same for all K.
        passed: `[..., K]` above 0.5 where all judges pass the completion (`passes_all`).
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` in nats over the groups of which a completion is kept.

    >>> rewards, passed = jnp.array([2.0, 3.0]), jnp.array([1.0, 0.0])
    >>> cgpo_crraft_loss(jnp.array([-4.0, -6.0]), rewards, jnp.full(2, 2.0), passed).value
    Array(2., dtype=float32)

    Xu et al. 2024, arXiv:2409.20370. No trainer has it.
    """
    check_lists(policy_logps, rewards, baseline_rewards, passed, where)
    there = jnp.ones(policy_logps.shape, bool) if where is None else where
    good = there & (passed > 0.5)
    kept = best_candidate(given(rewards, there), good)
    weights = calibrated_rewards(masked(rewards, there), masked(baseline_rewards, there))
    logps = masked(at_least_float32(policy_logps), there)
    loss = -jnp.sum(masked(weights.astype(logps.dtype) * logps, kept), axis=-1)
    return Mean.over(loss, jnp.any(good, axis=-1))
