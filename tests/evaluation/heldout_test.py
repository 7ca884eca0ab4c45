"""Held-out figures, from log-probs that are written down."""

import dataclasses

import numpy as np
import pytest

from paxo.data.batching import epoch_batches
from paxo.data.packing import choose_shape, pack_groups
from paxo.data.records import TokenGroup
from paxo.evaluation.heldout import nll_per_token, reward_accuracy, sign_accuracy
from paxo.scoring import attach_logps, make_scorer
from tests.made import made_batch, made_groups, tiny_policy


def group(labels, lengths=None):
    """A group whose candidates have these labels and lengths."""
    lengths = lengths or [2] * len(labels)
    completions = tuple(np.arange(3, 3 + n, dtype=np.int32) for n in lengths)
    finished = (True,) * len(labels)
    return TokenGroup(np.array([1, 2], np.int32), completions, finished, labels, {}, 0, "made:1")


def packed(groups):
    """One batch, and the place (row, g) of each group in it."""
    batch, index = pack_groups(groups, choose_shape(groups, row_length=32))
    return batch, {int(index[place]): place for place in zip(*np.nonzero(index >= 0))}


def logps(batch, places, values):
    """`[R, G, K]` with `values[i]` for the candidates of group i; nonsense where there is none."""
    array = np.full(batch.where.shape, np.nan, np.float32)
    for i, row in enumerate(values):
        array[places[i]][: len(row)] = row
    return array


def accuracy(groups, policy, reference=None, **settings):
    batch, places = packed(groups)
    if reference is not None:
        batch = batch.replace(fixed_logps={"reference": logps(batch, places, reference)})
    return reward_accuracy(lambda _: logps(batch, places, policy), [batch], **settings)


def test_a_pair_counts_when_the_log_ratio_of_the_chosen_is_larger_and_a_tie_half():
    pairs = [group((1.0, 0.0)) for _ in range(4)]
    policy = [(-5, -9), (-5, -9), (-9, -5), (-7, -7)]
    reference = [(-6, -9), (-4, -9), (-9, -4), (-8, -8)]
    # Margins of the log-ratios: 1, -1, 1, 0.
    found = accuracy(pairs, policy, reference)
    assert found.value == (1 + 0 + 1 + 0.5) / 4
    assert found.count == 4
    # Without a reference the log-probs alone: 4, 4, -4, 0.
    assert accuracy(pairs, policy).value == (1 + 1 + 0 + 0.5) / 4


def test_rewards_per_token_divide_by_the_lengths():
    pairs = [group((1.0, 0.0), [8, 2])]
    policy = [(-8.0, -4.0)]  # by token -1 and -2
    assert accuracy(pairs, policy).value == 0
    assert accuracy(pairs, policy, per_token=True).value == 1


def test_of_a_list_the_best_label_is_compared_with_the_worst():
    lists = [group((3.0, 1.0, 2.0)), group((1.0, 3.0, 2.0)), group((1.0, 1.0, 1.0))]
    policy = [(-4, -5, -1), (-4, -5, -1), (-4, -5, -1)]
    found = accuracy(lists, policy)
    assert found.value == 0.5  # right, wrong, and one without a preference that is left out
    assert found.count == 2


def test_the_labels_decide_and_not_the_place():
    swapped = [group((0.0, 1.0))]
    assert accuracy(swapped, [(-9, -5)]).value == 1


def test_groups_without_a_preference_alone_are_an_error():
    with pytest.raises(ValueError, match="no held-out group has two candidates with different"):
        accuracy([group((1.0, 1.0))], [(-1, -2)])
    with pytest.raises(ValueError, match="no held-out group"):
        reward_accuracy(lambda batch: batch, [])


def test_a_policy_that_is_its_own_reference_scores_a_half_exactly():
    policy, params = tiny_policy()
    scorer = make_scorer(policy, params)
    groups = made_groups(12)
    batches = [batch for batch, _ in epoch_batches(groups, choose_shape(groups), 4)]
    found = reward_accuracy(scorer, [attach_logps(b, "reference", scorer) for b in batches])
    assert (found.value, found.low, found.high, found.count) == (0.5, 0.5, 0.5, 12)


def test_accuracy_does_not_depend_on_how_groups_are_packed():
    policy, params = tiny_policy()
    scorer = make_scorer(policy, params)
    groups = made_groups(12)
    # Grades that the policy's own log-probs would not give.
    groups = [dataclasses.replace(g, labels=(0.0, 1.0) if i % 3 else (1.0, 0.0))
              for i, g in enumerate(groups)]  # fmt: skip
    found = set()
    for rows, length in ((1, 32), (4, 48)):
        shape = choose_shape(groups, row_length=length)
        batches = [batch for batch, _ in epoch_batches(groups, shape, rows)]
        found.add(reward_accuracy(scorer, batches).value)
    assert len(found) == 1
    assert 0 < found.pop() < 1


def test_nll_is_the_mean_over_completions_of_their_means_over_tokens():
    demonstrations = [group((1.0,), [2]), group((1.0,), [6])]
    batch, places = packed(demonstrations)
    scorer = lambda _: logps(batch, places, [(-4.0,), (-3.0,)])  # noqa: E731
    found = nll_per_token(scorer, [batch])
    assert found.value == pytest.approx((4 / 2 + 3 / 6) / 2)
    assert found.count == 2


def test_single_completions_are_right_where_the_reward_has_the_sign_of_the_label():
    batch = made_batch(10, rows=8, candidates=1)
    where = np.asarray(batch.where)
    signs = np.where(np.random.default_rng(0).random(where.shape) < 0.5, 1.0, -1.0)
    labels = np.where(where, signs, 0).astype(np.float32)
    reference = -np.ones(where.shape, np.float32)
    batch = batch.replace(labels=labels, fixed_logps={"reference": reference})
    assert sign_accuracy(lambda _: reference, [batch]).value == 0.5
    assert sign_accuracy(lambda _: reference + labels, [batch]).value == 1
    found = sign_accuracy(lambda _: reference + 1, [batch])
    assert found.count == where.sum() == 10
    assert found.value == np.mean(signs[where] > 0)
    with pytest.raises(ValueError, match="no held-out completion has a label"):
        sign_accuracy(lambda _: reference, [batch.replace(labels=0 * labels)])
