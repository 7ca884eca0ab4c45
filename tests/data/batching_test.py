import itertools
import json
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from paxo.data import windows
from paxo.data.batching import Batches, DataState, epoch_batches
from paxo.data.packing import RowShape, fill_rows, sequence_tokens
from paxo.data.records import TokenGroup

SHAPE = RowShape(length=24, slots=12, groups=6, candidates=2, max_completion=4)
WINDOW = 8


def make_groups(number):
    """Pairs; the last token of a prompt tells the number of its group."""
    rng = np.random.default_rng(5)
    groups = []
    for index in range(number):
        prompt = np.array([1] * rng.integers(0, 6) + [100 + index], np.int32)
        completions = tuple(np.full(size, 2, np.int32) for size in rng.integers(1, 5, 2))
        groups.append(
            TokenGroup(
                prompt, completions, (True, True), (1.0, 0.0), {}, index, f"d/p.jsonl:{index}"
            )
        )
    return groups


GROUPS = make_groups(29)


def stream(rows_per_batch=2, prefetch=0, window=WINDOW, **kwargs):
    return Batches(GROUPS, SHAPE, rows_per_batch, prefetch=prefetch, window=window, **kwargs)


def take(batches, number):
    return list(itertools.islice(batches, number))


def group_numbers(batches):
    """Numbers of the groups in the rows, in their order."""
    return [
        int(prompt[-1]) - 100
        for batch in batches
        for _, _, k, prompt, _ in sequence_tokens(batch)
        if k == 0
    ]


def epoch_rows(batches):
    """The rows of the epoch that the stream is in, as batches of one row."""
    epoch, rows = batches.state.epoch, []
    while batches.state.epoch == epoch:
        rows.append(next(batches))
    return rows


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_every_group_comes_exactly_once_an_epoch():
    batches = stream(rows_per_batch=1)
    for epoch in range(3):
        assert batches.state == DataState(0, epoch, 0, 0)
        assert sorted(group_numbers(epoch_rows(batches))) == list(range(len(GROUPS)))


def test_batches_run_over_the_ends_of_windows_and_epochs():
    rows = stream(rows_per_batch=1)
    singles = [row for _ in range(2) for row in epoch_rows(rows)]
    assert len(singles) % 3 or len(singles) % 5, "a batch should straddle the epochs' border"
    for size in (3, 5):
        together = stream(rows_per_batch=size)
        for start in range(0, len(singles) - size, size):
            joined = jax.tree.map(lambda *x: np.concatenate(x), *singles[start : start + size])
            assert_equal(next(together), joined)


def test_a_batch_may_be_larger_than_an_epoch():
    batch = next(stream(rows_per_batch=40))
    assert len(batch.tokens) == 40
    counts = np.bincount(group_numbers([batch]))
    assert len(counts) == len(GROUPS)
    assert counts.min() >= 1


def test_epochs_are_in_another_order_and_a_seed_always_in_the_same():
    batches = stream(rows_per_batch=1)
    first, second = (group_numbers(epoch_rows(batches)) for _ in range(2))
    assert first != second
    assert first == group_numbers(epoch_rows(stream(rows_per_batch=1)))
    assert first != group_numbers(epoch_rows(stream(rows_per_batch=1, seed=1)))


def test_windows_hold_another_part_of_the_whole_set_each_epoch():
    windows = []
    for epoch in range(2):
        batches = stream(rows_per_batch=1, state=DataState(0, epoch))
        numbers = []
        while batches.state.window == 0:
            numbers += group_numbers([next(batches)])
        # 29 groups in windows of at most 8: four windows, of 8, 7, 7 and 7.
        assert len(numbers) == 8
        assert max(numbers) > 8
        windows.append(set(numbers))
    assert windows[0] != windows[1]


def test_without_shuffle_windows_follow_the_order_of_the_set():
    batches = stream(rows_per_batch=1, shuffle=False)
    for _ in range(2):
        numbers = group_numbers(epoch_rows(batches))
        ends = [0, 8, 15, 22, 29]
        for start, end in itertools.pairwise(ends):
            assert sorted(numbers[start:end]) == list(range(start, end))


def test_rows_of_a_window_do_not_go_from_large_groups_to_small_ones():
    groups = make_groups(29) * 20
    batches = Batches(groups, SHAPE, 1, window=len(groups), prefetch=0)
    sizes = [group_numbers([row]) for row in epoch_rows(batches)]
    counts = np.array([len(row) for row in sizes])
    half = len(counts) // 2
    # Packed rows come with few large groups first: the halves then differ by more than one group.
    assert abs(counts[:half].mean() - counts[half:].mean()) < 0.5


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_stream_resumes_at_every_batch_of_two_epochs(prefetch):
    whole = stream(rows_per_batch=3)
    batches, states = [], [whole.state]
    while whole.state.epoch < 2:
        batches.append(next(whole))
        states.append(whole.state)
    assert len({state.window for state in states}) > 1
    assert len({state.row for state in states}) > 1
    again = stream(rows_per_batch=3, prefetch=prefetch)
    for n, state in enumerate(states[:-2]):
        state = DataState.from_dict(json.loads(json.dumps(state.to_dict())))
        fresh = stream(rows_per_batch=3, prefetch=prefetch, state=state)
        again.restore(state)
        for resumed in (fresh, again):
            assert resumed.state == state
            for batch, after in zip(batches[n : n + 2], states[n + 1 :]):
                assert_equal(next(resumed), batch)
                assert resumed.state == after
        fresh.close()
    again.close()


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_out_the_same_global_batches(process_count):
    alone = stream(rows_per_batch=4)
    parts = [
        stream(rows_per_batch=4, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    for _ in range(12):
        expected = next(alone)
        shares = [next(part) for part in parts]
        assert {len(share.tokens) for share in shares} == {4 // process_count}
        assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *shares), expected)
        assert {part.state for part in parts} == {alone.state}
        assert [row for part in parts for row in part.last_rows] == alone.last_rows


@pytest.mark.parametrize("first_row", [0, 2])
def test_every_row_is_filled_by_the_process_whose_it_is_and_by_no_other(first_row, monkeypatch):
    filled = []

    def noted(groups, rows, shape):
        filled.extend(rows)
        return fill_rows(groups, rows, shape)

    monkeypatch.setattr(windows, "fill_rows", noted)

    def filled_by(process, count):
        filled.clear()
        state = DataState(seed=0, row=first_row)
        take(stream(4, process_index=process, process_count=count, state=state), 12)
        return sorted(filled)

    whole, parts = filled_by(0, 1), [filled_by(process, 4) for process in range(4)]
    assert sorted(row for part in parts for row in part) == whole
    assert all(parts)


def test_a_run_of_two_processes_continues_on_four_and_on_one():
    alone = stream(rows_per_batch=4)
    take(alone, 5)
    expected = next(alone)
    two = stream(rows_per_batch=4, process_index=1, process_count=2)
    take(two, 5)
    parts = [
        stream(rows_per_batch=4, process_index=p, process_count=4, state=two.state)
        for p in range(4)
    ]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *map(next, parts))
    assert_equal(joined, expected)
    assert_equal(next(stream(rows_per_batch=4, state=two.state)), expected)


def test_packing_ahead_gives_the_same_batches_and_its_thread_ends():
    threads = threading.active_count()
    ahead, plain = stream(prefetch=2), stream()
    for _ in range(20):
        assert_equal(next(ahead), next(plain))
        assert ahead.state == plain.state
    assert threading.active_count() > threads
    state = ahead.state
    ahead.close()
    assert ahead.state == state
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(timeout=5)
    assert threading.active_count() == threads
    assert_equal(next(ahead), next(plain))
    ahead.close()


def test_a_program_that_does_not_close_its_stream_ends():
    program = (
        "import numpy as np\n"
        "from paxo.data.batching import Batches\n"
        "from paxo.data.packing import RowShape\n"
        "from paxo.data.records import TokenGroup\n"
        "ids = np.ones(2, np.int32)\n"
        "groups = [TokenGroup(ids, (ids,), (True,), (1.0,), {}, 0, 'a:1')] * 9\n"
        "stream = Batches(groups, RowShape(8, 4, 2, 1, 2), 2, window=2)\n"
        "print(next(stream).tokens.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "(2, 8)\n"


def test_identity_names_the_place_and_the_records_of_a_batch():
    batches = stream(rows_per_batch=2)
    assert "no batch yet" in batches.identity
    batch = next(batches)
    numbers = group_numbers([batch])
    assert [index for row in batches.last_rows for index in row] == numbers
    place, _, names = batches.identity.partition(": ")
    assert place == "epoch 0 window 0 rows 0-1"
    assert names.split(", ")[0] == f"p.jsonl:{numbers[0]}"


def test_identity_tells_the_windows_that_a_batch_runs_over():
    rows, singles = stream(rows_per_batch=1), []
    while rows.state.window == 0:
        singles.append(next(rows))
    singles.append(next(rows))
    size = len(singles)
    batches = stream(rows_per_batch=size)
    next(batches)
    place, _, names = batches.identity.partition(": ")
    assert place == f"epoch 0 window 0 rows 0-{size - 2}, epoch 0 window 1 rows 0-0"
    assert names.count("p.jsonl:") == 8
    assert names.endswith(f" and {len(group_numbers(singles)) - 8} more")


def test_an_epoch_in_order_gives_results_back_by_group():
    out = np.full(len(GROUPS), -1)
    shapes = set()
    for batch, index in epoch_batches(GROUPS, SHAPE, 4, window=WINDOW):
        shapes.add(batch.tokens.shape)
        values = np.zeros(index.shape, int)
        for row, g, _, prompt, _ in sequence_tokens(batch):
            values[row, g] = prompt[-1] - 100
        assert ((index >= 0) == batch.where.any(-1)).all()
        out[index[index >= 0]] = values[index >= 0]
    assert out.tolist() == list(range(len(GROUPS)))
    assert shapes == {(4, SHAPE.length)}


def test_an_epoch_in_order_is_shared_out_over_processes():
    alone = list(epoch_batches(GROUPS, SHAPE, 4, window=WINDOW))
    parts = [
        list(epoch_batches(GROUPS, SHAPE, 4, window=WINDOW, process_index=p, process_count=4))
        for p in range(4)
    ]
    assert {len(part) for part in parts} == {len(alone)}
    for expected, *shares in zip(alone, *parts):
        assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *shares), expected)


def test_steps_per_epoch_is_the_number_of_batches_of_an_epoch():
    batches = stream(rows_per_batch=1)
    assert batches.steps_per_epoch() == len(epoch_rows(batches))
    assert stream(rows_per_batch=4).steps_per_epoch() == batches.steps_per_epoch() / 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rows_per_batch": 3, "process_count": 2}, r"rows_per_batch \(3\) .* processes \(2\)"),
        ({"rows_per_batch": 0}, r"rows_per_batch \(0\)"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 is not below 2"),
        ({"seed": -1}, "DataState.seed must be an int of at least 0, got -1"),
        ({"state": DataState(seed=1)}, "seed 1, this stream seed 0"),
        ({"state": DataState(seed=0, window=4)}, "in window 4, but this set has 4 windows"),
        ({"state": DataState(seed=0, row=50)}, "row 50 of a window that has"),
        ({"window": 0}, "window=0"),
    ],
)
def test_wrong_arguments_are_refused_when_the_stream_is_made(arguments, words):
    with pytest.raises(ValueError, match=words):
        stream(**arguments)


def test_a_group_that_does_not_fit_is_refused_when_the_stream_is_made():
    long = TokenGroup(
        np.ones(30, np.int32), GROUPS[0].completions, (True,) * 2, (1, 0), {}, 9, "a:9"
    )
    with pytest.raises(ValueError, match="a:9: the group has"):
        Batches([*GROUPS, long], SHAPE, 2)
    with pytest.raises(ValueError, match="a:9: the group has"):
        epoch_batches([*GROUPS, long], SHAPE, 2)


def test_a_data_state_of_another_form_is_refused():
    with pytest.raises(ValueError, match=r"entries .*'window'.* got .*'step'"):
        DataState.from_dict({"seed": 0, "step": 3})
    assert DataState.from_dict(dict.fromkeys(("seed", "epoch", "window", "row"), np.int64(2))) == (
        DataState(2, 2, 2, 2)
    )
