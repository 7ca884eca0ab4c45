import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.data.packing import (
    RowShape,
    fill_rows,
    group_index,
    pack_groups,
    pack_rows,
    pad_rows,
    padding_share,
    sequence_tokens,
)
from paxo.data.records import TokenGroup


def make_group(prompt, *completions, index=0, extras=None, labels=None):
    return TokenGroup(
        prompt=np.array(prompt, np.int32),
        completions=tuple(np.array(c, np.int32) for c in completions),
        finished=(True,) * len(completions),
        labels=labels or tuple(float(k + 1) for k in range(len(completions))),
        extras=extras or {},
        index=index,
        source=f"pairs.jsonl:{index}",
    )


def random_groups(number, seed=0):
    """Groups of 1 to 3 candidates, no two tokens of a group alike."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(number):
        ids = iter(rng.permutation(100) + 1)
        sizes = rng.integers(1, 6, rng.integers(2, 5))
        parts = [[next(ids) for _ in range(size)] for size in sizes]
        groups.append(make_group(*parts, index=index))
    return groups


SHAPE = RowShape(length=32, slots=20, groups=4, candidates=3, max_completion=5)


def attention(batch):
    """[R, L, L] True where the query (second axis) sees the key (third): the rule of the batch."""
    group, branch = batch.group, batch.branch
    same = (group[:, :, None] == group[:, None, :]) & (group[:, :, None] != 0)
    shared = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    return same & shared & np.tril(np.ones((group.shape[1],) * 2, bool))


def test_a_row_holds_each_prompt_once_and_then_its_completions():
    groups = [make_group([1, 7, 8], [5, 2], [6, 4, 2], labels=(1, 0)), make_group([1], [9, 2])]
    shape = RowShape(length=13, slots=8, groups=2, candidates=2, max_completion=3)
    batch = fill_rows(groups, [[0, 1]], shape)
    assert batch.tokens.tolist() == [[1, 7, 8, 5, 2, 6, 4, 2, 1, 9, 2, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 0, 0]]
    assert batch.group.tolist() == [[1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0]]
    assert batch.branch.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 0, 1, 1, 0, 0]]
    assert batch.score_token.tolist() == [[5, 2, 6, 4, 2, 9, 2, 0]]
    assert batch.score_from.tolist() == [[2, 3, 2, 5, 6, 8, 9, 0]]
    assert batch.score_slot.tolist() == [[0, 0, 1, 1, 1, 2, 2, 4]]
    assert batch.labels.tolist() == [[[1, 0], [1, 0]]]
    assert batch.where.tolist() == [[[True, True], [True, False]]]
    assert batch.max_completion == 3
    integers = (batch.tokens, batch.positions, batch.group, batch.branch, batch.score_slot)
    assert all(array.dtype == np.int32 for array in integers)
    assert (batch.labels.dtype, batch.where.dtype) == (np.float32, bool)


def test_a_completion_sees_its_prompt_and_itself_only():
    groups = random_groups(40)
    batch, index = pack_groups(groups, SHAPE)
    sees = attention(batch)
    seen = 0
    for row in range(len(batch.tokens)):
        for query in np.flatnonzero(batch.group[row]):
            group = groups[index[row, batch.group[row, query] - 1]]
            branch = batch.branch[row, query]
            alone = [*group.prompt, *(group.completions[branch - 1] if branch else [])]
            size = batch.positions[row, query] + 1
            assert batch.tokens[row, sees[row, query]].tolist() == alone[:size]
            assert batch.positions[row, sees[row, query]].tolist() == list(range(size))
            seen += 1
    assert seen == sum(group.num_tokens for group in groups)
    assert not sees[batch.group == 0].any()


def test_each_completion_token_is_scored_once_from_what_precedes_it():
    groups = random_groups(40)
    batch, index = pack_groups(groups, SHAPE)
    sees = attention(batch)
    scored = {}
    for row, slot in zip(*np.nonzero(batch.score_slot < SHAPE.groups * SHAPE.candidates)):
        g, k = divmod(batch.score_slot[row, slot], SHAPE.candidates)
        before = batch.tokens[row, sees[row, batch.score_from[row, slot]]].tolist()
        scored.setdefault((index[row, g], k), []).append((before, batch.score_token[row, slot]))
    expected = {
        (i, k): [([*group.prompt, *completion[:j]], completion[j]) for j in range(len(completion))]
        for i, group in enumerate(groups)
        for k, completion in enumerate(group.completions)
    }
    assert scored == expected


def test_sequences_read_back_are_those_packed():
    groups = random_groups(40)
    batch, index = pack_groups(groups, SHAPE)
    found = [
        (int(index[row, g]), k, prompt.tolist(), completion.tolist())
        for row, g, k, prompt, completion in sequence_tokens(jax.tree.map(jnp.asarray, batch))
    ]
    expected = [
        (i, k, group.prompt.tolist(), completion.tolist())
        for i, group in enumerate(groups)
        for k, completion in enumerate(group.completions)
    ]
    assert sorted(found) == expected
    places = [(row, g, k) for row, g, k, _, _ in sequence_tokens(batch)]
    assert places == [tuple(place) for place in np.argwhere(batch.where)]


@pytest.mark.parametrize("shape", [(64, 40, 100), (64, 64, 100), (64, 24, 100), (64, 40, 3)])
def test_rows_never_exceed_a_capacity_and_hold_every_group_once(shape):
    length, slots, num_groups = shape
    shape = RowShape(length, slots, num_groups, candidates=2, max_completion=24)
    rng = np.random.default_rng(1)
    scored = rng.integers(1, 25, 500)
    tokens = scored + rng.integers(1, 41, 500)
    rows = pack_rows(tokens, scored, shape)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert max(tokens[row].sum() for row in rows) <= length
    assert max(scored[row].sum() for row in rows) <= slots
    assert max(map(len, rows)) <= num_groups
    assert rows == pack_rows(tokens, scored, shape)


@pytest.mark.parametrize(
    "sizes", [[19, 1, 18, 2, 17, 3] * 8, [14, 12, 6, 4, 4], [14, 9, 7, 4, 3, 3]]
)
def test_best_fit_finds_rows_without_padding(sizes):
    # 14 + 6, 12 + 4 + 4: the roomiest row is wrong for the 6.
    # 14 + 3 + 3, 9 + 7 + 4: the first row that has room is wrong for the 4.
    rows = pack_rows(np.array(sizes), np.ones(len(sizes)), RowShape(20, 20, 20, 1, 1))
    assert len(rows) == sum(sizes) / 20


def test_a_group_larger_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"11 tokens .* larger than a row"):
        pack_rows(np.array([3, 11]), np.array([1, 1]), RowShape(10, 10, 10, 1, 1))
    group = make_group([1] * 30, [5, 6, 7], index=4)
    with pytest.raises(ValueError, match=r"pairs.jsonl:4: the group has 33 tokens, but .* 32"):
        pack_groups([*random_groups(3), group], SHAPE)
    with pytest.raises(ValueError, match=r"pairs.jsonl:5: the group has 4 candidates"):
        pack_groups([make_group([1], [2], [2], [2], [2], index=5)], SHAPE)
    with pytest.raises(ValueError, match=r"pairs.jsonl:6: .* 6 tokens in its longest completion"):
        pack_groups([make_group([1], [2] * 6, index=6)], SHAPE)


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (make_group([], [5], index=3), "prompt has no token"),
        (make_group([1], [5], [], index=3), r"lengths \[1, 0\]"),
        (make_group([1], index=3), r"lengths \[\]"),
        (make_group([1], [5], [6], index=3, labels=(1.0,)), "1 labels for 2 candidates"),
    ],
)
def test_a_group_that_cannot_be_scored_is_refused_by_its_source(group, words):
    with pytest.raises(ValueError, match=f"pairs.jsonl:3: .*{words}"):
        pack_groups([make_group([1], [5]), group], SHAPE)


def test_padding_rows_are_empty_and_change_nothing_else():
    groups = random_groups(10)
    batch, index = pack_groups(groups, SHAPE)
    batch = batch.replace(fixed_logps={"reference": np.ones(batch.where.shape, np.float32)})
    num_rows = len(batch.tokens)
    padded = pad_rows(batch, num_rows + 2)
    own = jax.tree.map(lambda array: array[:num_rows], padded)
    jax.tree.map(np.testing.assert_array_equal, own, batch)
    added = jax.tree.map(lambda array: array[num_rows:], padded)
    assert len(added.tokens) == 2
    assert (added.score_slot == SHAPE.groups * SHAPE.candidates).all()
    rest = added.replace(score_slot=np.zeros(0))
    assert not any(array.any() for array in jax.tree.leaves(rest))
    again, padded_index = pack_groups(groups, SHAPE, num_rows=num_rows + 2)
    np.testing.assert_array_equal(again.tokens, padded.tokens)
    np.testing.assert_array_equal(padded_index[:num_rows], index)
    assert (padded_index[num_rows:] == -1).all()
    with pytest.raises(ValueError, match="more than num_rows=1"):
        pad_rows(batch, 1)


def test_padding_share_counts_positions_without_a_token():
    shape = RowShape(length=8, slots=4, groups=1, candidates=1, max_completion=2)
    batch, _ = pack_groups([make_group([1], [5, 2])], shape, num_rows=2)
    assert padding_share(batch) == (16 - 3) / 16


def test_results_come_back_into_the_order_of_the_groups():
    groups = random_groups(20)
    batch, index = pack_groups(groups, SHAPE)
    sums = np.zeros((*index.shape, SHAPE.candidates))
    for row, g, k, _, completion in sequence_tokens(batch):
        sums[row, g, k] = completion.sum()
    out = np.zeros((len(groups), SHAPE.candidates))
    out[index[index >= 0]] = sums[index >= 0]
    for i, group in enumerate(groups):
        assert out[i].tolist() == [c.sum() for c in group.completions] + [0] * (
            SHAPE.candidates - len(group.completions)
        )
    assert group_index([[2, 0]], SHAPE, 1).tolist() == [[2, 0, -1, -1]]


def test_extras_are_laid_out_by_group_and_candidate():
    def extras(size, value):
        wins = np.full((size, size), value)
        return {"weight": np.float32(value), "score": np.full(size, value), "wins": wins}

    groups = [
        make_group([1], [5], [6], extras=extras(2, 7.0)),
        make_group([1], [5], [6], [8], extras=extras(3, 9.0)),
    ]
    batch = fill_rows(groups, [[1, 0]], SHAPE)
    assert batch.extras["weight"].tolist() == [[9, 7, 0, 0]]
    assert batch.extras["score"].tolist() == [[[9, 9, 9], [7, 7, 0], [0, 0, 0], [0, 0, 0]]]
    assert batch.extras["wins"][0, 1].tolist() == [[7, 7, 0], [7, 7, 0], [0, 0, 0]]
    assert all(array.dtype == np.float32 for array in batch.extras.values())


def test_extras_whose_name_tells_their_axes_are_laid_out_by_token_and_by_vector():
    first = make_group([1], [5], [6, 7], extras={
        "advantage:KT": (np.array([1.0]), np.array([2.0, 3.0])),
        "vector:KD": np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "scale:D": np.array([7.0, 8.0]),
    })  # fmt: skip
    batch = fill_rows([first], [[0]], SHAPE)
    tokens = batch.extras["advantage"][0, 0]
    assert tokens.shape == (SHAPE.candidates, SHAPE.max_completion)
    assert tokens[:, :3].tolist() == [[1, 0, 0], [2, 3, 0], [0, 0, 0]]
    assert batch.extras["vector"][0, 0].tolist() == [[1, 2, 3], [4, 5, 6], [0, 0, 0]]
    assert batch.extras["scale"][0].tolist() == [[7, 8]] + [[0, 0]] * (SHAPE.groups - 1)
    wrong = {"advantage:KT": (np.array([1.0]), np.array([2.0]))}
    with pytest.raises(ValueError, match=r"pairs.jsonl:4: extra 'advantage:KT' has \[1, 1\] num"):
        pack_groups([make_group([1], [5], [6, 7], index=4, extras=wrong)], SHAPE)
    other = {name: first.extras[name] for name in ("advantage:KT", "vector:KD")}
    other |= {"scale:D": np.zeros(3)}
    with pytest.raises(ValueError, match=r"pairs.jsonl:5: extra 'scale:D' has shape \(3,\)"):
        pack_groups([first, make_group([1], [5], [6, 7], index=5, extras=other)], SHAPE)


def test_extras_that_differ_between_records_are_refused():
    first = make_group([1], [5], [6], extras={"score": np.ones(2)})
    without = make_group([1], [5], [6], index=8)
    with pytest.raises(ValueError, match=r"pairs.jsonl:8: .* extras \[\], others .*'score'"):
        pack_groups([first, without], SHAPE)
    short = make_group([1], [5], [6], index=9, extras={"score": np.ones(3)})
    with pytest.raises(ValueError, match=r"pairs.jsonl:9: extra 'score' has shape \(3,\)"):
        pack_groups([first, short], SHAPE)
