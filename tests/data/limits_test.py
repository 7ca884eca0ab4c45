import dataclasses

import numpy as np
import pytest

from paxo.data.limits import Dropped, TokenLimits, fit, keep_end
from paxo.data.records import RecordError, TokenGroup

BOS, EOS = 1, 2


def group(prompt, *completions, labels=None):
    """Prompt 1, 100, 101, ...; completions of the given lengths that end in EOS."""
    prompt_ids = [BOS, *range(100, 99 + prompt)]
    return TokenGroup(
        prompt=np.array(prompt_ids, np.int32),
        completions=tuple(
            np.array([*range(10 + 100 * k, 9 + 100 * k + n), EOS], np.int32)
            for k, n in enumerate(completions)
        ),
        finished=(True,) * len(completions),
        labels=labels or (1.0, 0.0, 0.0)[: len(completions)],
        extras={},
        index=0,
        source="pairs.jsonl:17",
    )


def lengths(group):
    return len(group.prompt), [len(completion) for completion in group.completions]


def test_nothing_is_cut_that_fits_exactly():
    limits = TokenLimits(max_prompt=6, max_completion=4, max_sequence=10, max_group=13)
    whole = group(6, 4, 3)
    assert fit(whole, limits, bos_id=BOS) is whole


def test_keep_end_keeps_bos_and_the_end_of_the_prompt():
    limits = TokenLimits(max_prompt=4, long_prompt="keep_end")
    cut = fit(group(8, 3, 3), limits, bos_id=BOS)
    assert cut.prompt.tolist() == [BOS, 104, 105, 106]
    assert lengths(cut)[1] == [3, 3]


def test_keep_end_without_bos_keeps_the_end_alone():
    assert keep_end(np.array([5, 6, 7]), 2).tolist() == [6, 7]
    assert keep_end(np.array([5, 6, 7]), 2, bos_id=1).tolist() == [6, 7]
    assert keep_end(np.array([1, 6, 7]), 3, bos_id=1).tolist() == [1, 6, 7]


def test_a_cut_completion_has_no_eos_and_is_not_finished():
    limits = TokenLimits(max_completion=3, long_completion="cut")
    cut = fit(group(4, 5, 3), limits)
    assert cut.completions[0].tolist() == [10, 11, 12]
    assert cut.completions[1].tolist() == [110, 111, EOS]
    assert cut.finished == (False, True)


@pytest.mark.parametrize(
    ("sizes", "limits", "part"),
    [
        ((9, 2, 2), {"max_prompt": 8}, "prompt longer than 8 tokens"),
        ((4, 9, 2), {"max_completion": 8}, "completion longer than 8 tokens"),
        ((6, 2, 5), {"max_sequence": 10}, "prompt and completion longer than 10 tokens"),
        ((6, 4, 5), {"max_group": 14}, "prompt and all completions longer than 14 tokens"),
    ],
)
def test_each_limit_raises_or_drops_by_its_policy(sizes, limits, part):
    with pytest.raises(RecordError) as caught:
        fit(group(*sizes), TokenLimits(**limits))
    assert caught.value.reason == part
    assert str(caught.value).startswith("pairs.jsonl:17: field ")
    (name,) = limits
    assert f"raise {name} or set long_" in str(caught.value)
    drop = dict.fromkeys(("long_prompt", "long_completion", "long_group"), "drop")
    with pytest.raises(Dropped, match=part):
        fit(group(*sizes), TokenLimits(**limits, **drop))


def test_a_long_sequence_loses_the_start_of_its_prompt_first():
    limits = TokenLimits(max_sequence=12, long_prompt="keep_end", long_completion="cut")
    assert lengths(fit(group(10, 4, 2), limits, bos_id=BOS)) == (8, [4, 2])


def test_the_prompt_keeps_half_of_the_sequence_and_completions_are_cut_to_the_rest():
    limits = TokenLimits(max_sequence=12, long_prompt="keep_end", long_completion="cut")
    cut = fit(group(10, 9, 2), limits, bos_id=BOS)
    assert lengths(cut) == (6, [6, 2])
    assert cut.finished == (False, True)
    # A prompt that is shorter than half is left alone.
    assert lengths(fit(group(4, 9, 2), limits, bos_id=BOS)) == (4, [8, 2])


def test_without_keep_end_completions_make_room_for_the_prompt():
    limits = TokenLimits(max_sequence=12, long_completion="cut")
    assert lengths(fit(group(10, 9, 2), limits)) == (10, [2, 2])
    with pytest.raises(RecordError, match="long_prompt"):
        fit(group(12, 9, 2), limits)


@pytest.mark.parametrize("policy", ["long_prompt", "long_completion"])
def test_either_policy_drop_lets_a_long_sequence_go(policy):
    limits = TokenLimits(max_sequence=12, **{policy: "drop"})
    with pytest.raises(Dropped, match="prompt and completion longer than 12"):
        fit(group(7, 7, 2), limits)


def test_every_fitted_group_is_within_all_limits():
    rng = np.random.default_rng(0)
    limits = TokenLimits(
        max_prompt=10,
        max_completion=7,
        max_sequence=14,
        long_prompt="keep_end",
        long_completion="cut",
    )
    for _ in range(300):
        sizes = rng.integers(1, 20, 3).tolist()
        fitted = fit(group(*sizes), limits, bos_id=BOS)
        prompt, completions = lengths(fitted)
        assert prompt <= 10
        assert max(completions) <= 7
        assert prompt + max(completions) <= 14
        assert min(completions) >= 1
        assert fitted.prompt[0] == BOS
        for ids, finished in zip(fitted.completions, fitted.finished):
            assert finished == (ids[-1] == EOS)


def test_a_pair_that_cutting_makes_equal_is_dropped():
    same = group(4, 6, 6)
    alike = same.completions[0].copy()
    alike[4] += 1
    pair = TokenGroup(**{**vars(same), "completions": (same.completions[0], alike)})
    assert fit(pair, TokenLimits()) is pair
    with pytest.raises(Dropped, match="chosen equals rejected once cut"):
        fit(pair, TokenLimits(max_completion=4, long_completion="cut"))


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("long_prompt", "keepend", "did you mean 'keep_end'"),
        ("long_prompt", "cut", "'error', 'drop', 'keep_end'"),
        ("long_completion", "Cut", "did you mean 'cut'"),
        ("long_group", "cut", "'error', 'drop'"),
        ("max_prompt", 1, "at least 2"),
        ("max_completion", 0, "at least 1"),
        ("max_sequence", 0, "at least 2"),
    ],
)
def test_a_wrong_limit_is_refused_when_it_is_written(name, value, hint):
    with pytest.raises(ValueError, match=hint) as caught:
        TokenLimits(**{name: value})
    assert f"{name}=" in str(caught.value)


def test_numbers_of_tokens_are_cut_with_their_completion():
    whole = group(4, 5, 3)
    numbers = tuple(
        np.arange(len(completion), dtype=np.float32) for completion in whole.completions
    )
    extras = {"advantage:KT": numbers, "score": np.ones(2, np.float32)}
    whole = dataclasses.replace(whole, extras=extras)
    for limits in (
        TokenLimits(max_completion=3, long_completion="cut"),
        TokenLimits(max_sequence=7, long_completion="cut"),
    ):
        cut = fit(whole, limits)
        assert [len(completion) for completion in cut.completions] == [3, 3]
        assert [x.tolist() for x in cut.extras["advantage:KT"]] == [[0, 1, 2], [0, 1, 2]]
        assert cut.extras["score"] is extras["score"]
