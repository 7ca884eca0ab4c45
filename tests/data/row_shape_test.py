import gzip
import json

import numpy as np
import pytest

from paxo.data.records import TokenGroup
from paxo.data.row_shape import RowShape, choose_shape, group_sizes, pack_rows, packing_overhead


def sized_group(prompt, *completions, index=0):
    return TokenGroup(
        prompt=np.ones(prompt, np.int32),
        completions=tuple(np.ones(size, np.int32) for size in completions),
        finished=(True,) * len(completions),
        labels=(0.0,) * len(completions),
        extras={},
        index=index,
        source=f"pairs.jsonl:{index}",
    )


def pairs(number, seed=0):
    rng = np.random.default_rng(seed)
    return [sized_group(*rng.integers(1, (120, 60, 60), 3), index=index) for index in range(number)]


@pytest.fixture(scope="module")
def gpt2(shared_data):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")


def read(path):
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in text.splitlines()]


def as_text(messages):
    if isinstance(messages, str):
        return messages
    return "".join(f"\n\n{m['role'].capitalize()}: {m['content']}" for m in messages)


def real_groups(rows, tokenizer):
    """All groups of a set, prompts cut to 384 tokens and completions to 256."""
    prompts = [as_text(row["prompt"]) + "\n\nAssistant:" for row in rows]
    candidates = [row.get("responses") or [row["chosen"], row["rejected"]] for row in rows]
    texts = prompts + [" " + as_text(text) for texts in candidates for text in texts]
    ids = iter(tokenizer(texts)["input_ids"])
    prompt_sizes = [min(len(next(ids)) + 1, 384) for _ in prompts]
    return [
        sized_group(size, *(min(len(next(ids)) + 1, 256) for _ in texts), index=index)
        for index, (size, texts) in enumerate(zip(prompt_sizes, candidates))
    ]


@pytest.mark.parametrize(
    ("path", "most_candidates"),
    [
        ("pairs_hh_harmless/pairs.jsonl.gz", 2),
        ("lists_oasst_en100/lists.jsonl", 9),
        ("lists_alpaca_eval/lists.jsonl.gz", 9),
    ],
)
def test_real_sets_pack_with_little_padding(shared_data, gpt2, path, most_candidates):
    rows = read(shared_data / path)
    groups = real_groups(rows, gpt2)
    assert len(groups) == len(rows)
    shape = choose_shape(groups)
    assert shape.candidates == most_candidates
    tokens, slots = sizes = group_sizes(groups)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(groups))
        overhead = packing_overhead(sizes.take(order), shape, window=256)
        assert overhead.rows * shape.length <= 1.10 * tokens.sum()
        assert overhead.rows * shape.slots <= 1.50 * slots.sum()


def test_the_shape_follows_from_the_lengths_of_the_set():
    groups = pairs(600)
    shape = choose_shape(groups)
    tokens, slots = sizes = group_sizes(groups)
    assert shape.length >= tokens.max()
    assert shape.slots >= slots.max()
    assert (shape.candidates, shape.max_completion) == (
        2,
        max(max(map(len, g.completions)) for g in groups),
    )
    assert (shape.length % 128, shape.slots % 64) == (0, 0)
    overhead = packing_overhead(sizes, shape)
    assert overhead.positions <= 1.10
    assert overhead.slots <= 1.50
    assert shape == choose_shape(groups)


def test_overhead_is_what_the_rows_compute_over_what_is_needed():
    groups = pairs(50)
    sizes = group_sizes(groups)
    shape = RowShape(512, 256, 50, 2, 60)
    halves = [pack_rows(*sizes.take(np.arange(*part)), shape) for part in ((0, 25), (25, 50))]
    rows = sum(map(len, halves))
    needed = sum(group.num_tokens for group in groups)
    scored = sum(len(c) for group in groups for c in group.completions)
    found = packing_overhead(sizes, shape, window=25)
    assert found == (rows, rows * 512 / needed, rows * 256 / scored)


def test_given_sizes_are_kept():
    groups = pairs(300)
    assert choose_shape(groups, row_length=700).length == 700
    given = choose_shape(groups, row_length=640, slots=320)
    assert (given.length, given.slots) == (640, 320)
    assert choose_shape(groups, slots=512).slots == 512


def test_dense_attention_of_a_narrow_model_wants_shorter_rows():
    groups = pairs(600)
    found = [choose_shape(groups, slot_weight=2.0, width=width).length for width in (64, None)]
    assert found[0] < found[1]


def test_a_costly_head_wants_slots_that_are_filled():
    groups = pairs(600)
    sizes = group_sizes(groups)
    cheap, costly = (
        packing_overhead(sizes, choose_shape(groups, slot_weight=weight)) for weight in (0.02, 2.0)
    )
    assert costly.slots < cheap.slots


def test_of_rows_that_cost_about_the_same_the_shortest_is_taken():
    # A group of 125 tokens leaves 3 of 128, and three of them 9 of 384, where a group of 8 fits.
    groups = [sized_group(1, 62, 62)] * 60 + [sized_group(1, 3, 4)] * 10
    sizes = group_sizes(groups)
    computed = [packing_overhead(sizes, RowShape(n, n, 70, 2, 62)).rows * n for n in (128, 384)]
    assert computed == [61 * 128, 20 * 384]
    shape = choose_shape(groups)
    assert (shape.length, shape.slots) == (128, 128)


def test_bounds_on_padding_come_before_cost():
    # Groups of 135 tokens. Attention makes rows of 512 (three groups, 1.26) the cheaper ones for so
    # narrow a model, but only 1024 (seven groups, 1.08) stays within 1.10.
    groups = [sized_group(115, 10, 10)] * 84
    assert choose_shape(groups, width=64).length == 1024
    # Where no row can, the cheapest is taken: one group of 700 tokens leaves most of any row empty.
    assert choose_shape([sized_group(650, 25, 25)]).length == 768


def test_rows_have_room_for_many_short_groups():
    groups = [sized_group(3, 2, 2) for _ in range(500)] + [sized_group(100, 20, 20)]
    shape = choose_shape(groups)
    unbound = RowShape(shape.length, shape.slots, 501, 2, 20)
    sizes = group_sizes(groups)
    assert packing_overhead(sizes, shape).rows <= packing_overhead(sizes, unbound).rows * 1.05


def test_a_row_too_short_names_the_longest_group_and_the_way_out():
    groups = [*pairs(5), sized_group(200, 30, 40, index=17)]
    expected = r"pairs.jsonl:17: the group has 270 tokens, but a row takes 256 \(1 of 6 groups"
    with pytest.raises(ValueError, match=rf"{expected} .*: raise row_length, .* TokenLimits"):
        choose_shape(groups, row_length=256)
    with pytest.raises(ValueError, match=r"pairs.jsonl:17: .* 70 scored tokens, .* 64 .*slots"):
        choose_shape([sized_group(1, 3), groups[-1]], slots=64)


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="no group to pack"):
        choose_shape([])


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((8, 9, 1, 1, 1), r"slots \(9\) exceeds length \(8\)"),
        ((8, 4, 0, 1, 1), "RowShape.groups must be an int of at least 1, got 0"),
        ((8.0, 4, 1, 1, 1), "RowShape.length must be an int"),
    ],
)
def test_a_shape_that_no_row_can_have_is_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        RowShape(*sizes)


def test_a_window_holds_at_least_one_group():
    with pytest.raises(ValueError, match="window=0"):
        choose_shape(pairs(3), window=0)
