"""Held-out preferences: are they ordered as labelled? Held-out demonstrations: how likely?"""

from collections.abc import Iterable

import numpy as np

from paxo import metrics
from paxo.evaluation.estimates import Estimate, bootstrap_mean
from paxo.rows import everywhere
from paxo.scoring import slot_lengths
from paxo.types import PreferenceBatch, Scorer


def reward_accuracy(
    scorer: Scorer,
    batches: Iterable[PreferenceBatch],
    *,
    scale: float = 1.0,
    per_token: bool = False,
) -> Estimate:
    """Share of groups whose best candidate has a higher implicit reward than their worst.

    Ties count half, so a policy that equals its reference scores 0.5 exactly. Groups whose labels
    do not differ are left out.

    Args:
        scorer: log-probs of the policy that is measured.
        batches: rows with `fixed_logps["reference"]` (or "previous") attached, or without: then
            the reward is the policy's own log-prob. Host arrays, or, with several processes,
            placed on the mesh (`paxo.rows.place_rows`): every process finds the same figure.
        scale: beta.
        per_token: divide by lengths, as reference-free objectives do.

    Raises:
        ValueError: if no group has two candidates with different labels.
    """
    scores = []
    for batch in batches:
        rewards, labels, where = _judged(scorer, batch, scale, per_token)
        best, worst, differ = map(np.asarray, metrics.best_and_worst(labels, where))
        chosen = np.take_along_axis(rewards, best[..., None], -1)[..., 0]
        rejected = np.take_along_axis(rewards, worst[..., None], -1)[..., 0]
        scores.append(np.asarray(metrics.accuracies(chosen, rejected))[differ])
    if not scores or not np.concatenate(scores).size:
        raise ValueError("no held-out group has two candidates with different labels")
    return bootstrap_mean(np.concatenate(scores))


def sign_accuracy(
    scorer: Scorer,
    batches: Iterable[PreferenceBatch],
    *,
    scale: float = 1.0,
    per_token: bool = False,
) -> Estimate:
    """Share of single completions whose implicit reward has the sign of their label.

    A reward of 0 counts half, so a policy that equals its reference scores 0.5 exactly. Completions
    with label 0 are left out. Arguments are those of `reward_accuracy`.

    Raises:
        ValueError: if no completion has a label.
    """
    scores = []
    for batch in batches:
        rewards, labels, where = _judged(scorer, batch, scale, per_token)
        judged = where & (labels != 0)
        found = metrics.accuracies(np.sign(labels) * rewards, np.zeros_like(rewards))
        scores.append(np.asarray(found)[judged])
    if not scores or not np.concatenate(scores).size:
        raise ValueError("no held-out completion has a label above or below 0")
    return bootstrap_mean(np.concatenate(scores))


def nll_per_token(scorer: Scorer, batches: Iterable[PreferenceBatch]) -> Estimate:
    """Negative log-likelihood of completions in nats per token, averaged over completions.

    Args:
        scorer: log-probs of the policy that is measured.
        batches: rows as for `reward_accuracy`, with nothing attached.
    """
    losses = []
    for batch in batches:
        found = scorer(batch), slot_lengths(batch), batch.where
        logps, lengths, where = everywhere(found)
        some = where & (lengths > 0)
        losses.append(-logps[some] / lengths[some])
    return bootstrap_mean(np.concatenate(losses))


def _judged(
    scorer: Scorer, batch: PreferenceBatch, scale: float, per_token: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[R, G, K]` implicit rewards of the policy, labels and masks of the rows of all processes."""
    inputs = {"policy_logps": scorer(batch), "lengths": slot_lengths(batch)}
    inputs |= {f"{role}_logps": x for role, x in batch.fixed_logps.items()}
    inputs, labels, where = everywhere((inputs, batch.labels, batch.where))
    rewards = metrics.implicit_rewards(inputs, scale, per_token=per_token)
    return np.asarray(rewards), labels, where
