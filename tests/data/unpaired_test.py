"""Labels as signs, and mismatched completions: drawn by epoch, packed, continued bit for bit."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from paxo.data.batching import Batches, DataState, epoch_batches
from paxo.data.packing import choose_shape, sequence_tokens
from paxo.data.records import DataError, TokenGroup
from paxo.data.unpaired import Mismatch, Mismatched, derangement, signed

LIMIT = 12


def made(number, *, candidates=1, prompts=None):
    """Groups whose prompt tells its number, and whose completions tell theirs."""
    rng = np.random.default_rng(3)
    groups = []
    for i in range(number):
        prompt = np.array([1] * rng.integers(0, 6) + [100 + i], np.int32)
        if prompts is not None:
            prompt = np.array([100 + i % prompts], np.int32)
        completions = tuple(
            np.full(rng.integers(1, 8), 1000 + 10 * i + k, np.int32) for k in range(candidates)
        )
        labels = (1.0, -1.0)[:candidates]
        extras = {"weight": np.float32(i), "score": np.full(candidates, i, np.float32)}
        groups.append(
            TokenGroup(prompt, completions, (True,) * candidates, labels, extras, i, f"d:{i}")
        )
    return groups


def donors(batches, candidates=1):
    """(epoch's) number of a group -> number of the group and candidate it was given."""
    found = {}
    for batch in batches:
        for row, g, k, prompt, completion in sequence_tokens(batch):
            if k == candidates:
                assert batch.labels[row, g, k] == 0
                found[int(prompt[-1]) - 100] = divmod(int(completion[0]) - 1000, 10)
    return found


def stream(groups, shape, rows=2, **kwargs):
    mismatch = Mismatch(max_sequence=LIMIT)
    return Batches(groups, shape, rows, window=8, prefetch=0, mismatch=mismatch, **kwargs)


def epoch_of(batches):
    epoch, found = batches.state.epoch, []
    while batches.state.epoch == epoch:
        found.append(next(batches))
    return found


@pytest.mark.parametrize("candidates", [1, 2])
def test_every_completion_is_given_to_a_group_of_another_prompt(candidates):
    groups = made(29, candidates=candidates)
    shape = choose_shape(groups, mismatch=Mismatch(LIMIT))
    assert shape.candidates == candidates + 1
    batches = stream(groups, shape, rows=1)
    seen = []
    for _ in range(2):
        given = donors(epoch_of(batches), candidates)
        assert sorted(given) == list(range(29))
        assert sorted(donor for donor, _ in given.values()) == list(range(29))
        assert all(donor != own for own, (donor, _) in given.items())
        assert {k for _, k in given.values()} == set(range(candidates))
        seen.append(given)
    assert seen[0] != seen[1]


def test_draws_follow_from_seed_and_epoch_and_from_nothing_of_the_batch():
    groups = made(29)
    shape = choose_shape(groups, mismatch=Mismatch(LIMIT))
    expected = donors(epoch_of(stream(groups, shape, rows=1)))
    assert donors(epoch_of(stream(groups, shape, rows=1, shuffle=False))) == expected
    assert donors(epoch_of(stream(groups, shape, rows=1, seed=1))) != expected
    wide = choose_shape(groups, row_length=128, mismatch=Mismatch(LIMIT))
    assert donors(epoch_of(stream(groups, wide, rows=1))) == expected
    once = [batch for batch, _ in epoch_batches(groups, shape, 2, mismatch=Mismatch(LIMIT))]
    assert donors(once) == expected


def test_a_stream_goes_on_to_the_bit_from_any_place():
    groups = made(29, candidates=2)
    shape = choose_shape(groups, mismatch=Mismatch(LIMIT))
    batches = stream(groups, shape, rows=3)
    for _ in range(12):
        state = batches.state
        again = stream(groups, shape, rows=3, state=DataState.from_dict(state.to_dict()))
        jax.tree.map(np.testing.assert_array_equal, next(again), next(batches))
    assert state.epoch >= 1


def test_a_mismatched_completion_is_cut_to_the_longest_sequence():
    groups = made(29)
    shape = choose_shape(groups, mismatch=Mismatch(LIMIT))
    epoch = Mismatched(groups, Mismatch(LIMIT), seed=0).epoch(0)
    lengths = {int(g.completions[0][0]): len(g.completions[0]) for g in groups}
    cut = 0
    for group in epoch:
        ids, whole = group.completions[1], lengths[int(group.completions[1][0])]
        assert len(ids) == min(whole, LIMIT - len(group.prompt)) >= 1
        assert group.finished[1] == (len(ids) == whole)
        cut += len(ids) < whole
    assert 0 < cut < 29
    assert max(group.num_tokens for group in epoch) <= shape.length


def test_extras_hold_zero_for_it():
    group = Mismatched(made(3, candidates=2), Mismatch(), seed=0).epoch(0)[1]
    assert float(group.extras["weight"]) == 1
    assert group.extras["score"].tolist() == [1, 1, 0]


def test_records_of_one_prompt_are_not_given_to_one_another():
    groups = made(30, prompts=3)
    for epoch in range(3):
        for group in Mismatched(groups, Mismatch(), seed=0).epoch(epoch):
            donor = int(group.completions[1][0] - 1000) // 10
            assert donor % 3 != int(group.prompt[0]) - 100


def test_a_derangement_is_a_permutation_even_where_one_class_holds_half():
    classes = np.array([0] * 5 + [1, 2, 2, 3, 4])
    reached = set()
    for seed in range(40):
        others = derangement(classes, np.random.default_rng(seed))
        assert sorted(others) == list(range(10))
        assert not np.any(classes == classes[others])
        reached.add(int(others[0]))
    assert reached == {5, 6, 7, 8, 9}


def test_sets_without_other_prompts_are_refused():
    with pytest.raises(DataError, match=r"d:0: 5 of 5 records have this prompt"):
        Mismatched(made(5, prompts=1), Mismatch(), seed=0)


def test_a_row_without_room_for_the_longest_is_refused():
    groups = made(29)
    plain = choose_shape(groups, row_length=max(g.num_tokens for g in groups))
    with pytest.raises(DataError, match="with a mismatched completion, but a row takes"):
        stream(groups, plain)
    with pytest.raises(DataError, match="leaves no token of max_sequence=3"):
        Mismatched(groups, Mismatch(3), seed=0)


def with_labels(*labels):
    ids = tuple(np.array([k], np.int32) for k in range(len(labels)))
    return TokenGroup(ids[0], ids, (True,) * len(labels), labels, {}, 0, "d.jsonl:7")


@pytest.mark.parametrize(
    ("labels", "signs"),
    [((1.0, 0.0), (1, -1)), ((0.0, 1.0), (-1, 1)), ((1.0,), (1,)), ((-1.0, -1.0, 1.0),) * 2],
)
def test_grades_of_pairs_become_signs(labels, signs):
    assert signed([with_labels(*labels)])[0].labels == signs


@pytest.mark.parametrize("labels", [(3.0, 5.0), (0.0,), (1.0, 0.0, 0.0), (0.5, 0.0), (0.0, 0.0)])
def test_other_grades_are_refused_by_record(labels):
    with pytest.raises(DataError, match=r"d.jsonl:7: the completions have the grades \["):
        signed([with_labels(*labels)])


def test_a_thread_that_packs_ahead_gives_the_same():
    groups = made(29)
    shape = choose_shape(groups, mismatch=Mismatch(LIMIT))
    ahead = Batches(groups, shape, 3, window=8, prefetch=2, mismatch=Mismatch(LIMIT))
    for one, other in itertools.islice(zip(ahead, stream(groups, shape, rows=3)), 12):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    ahead.close()


def test_extras_of_every_shape_are_padded_for_it():
    groups = made(3, candidates=2)
    extras = {
        "tokens:KT": tuple(np.ones(len(c), np.float32) for c in groups[0].completions),
        "wins": np.ones((2, 2), np.float32),
        "vectors:KD": np.ones((2, 3), np.float32),
        "scale:D": np.ones(4, np.float32),
    }
    groups[0] = dataclasses.replace(groups[0], extras=extras)
    found = Mismatched(groups, Mismatch(), seed=0).epoch(0)[0].extras
    assert [len(x) for x in found["tokens:KT"]] == [*map(len, groups[0].completions), 0]
    assert found["wins"].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert found["vectors:KD"].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert found["scale:D"].tolist() == [1, 1, 1, 1]
