"""How often ours is preferred over theirs."""

import numpy as np
import pytest

from paxo.evaluation.win_rate import win_rate


def test_the_win_rate_is_the_mean_over_prompts_and_ties_count_half():
    found = win_rate(np.array([1.0, 1.0, 0.5, 0.0]))
    assert found.value == (1 + 1 + 0.5 + 0) / 4
    assert found.low < found.value < found.high
    assert found.count == 4


def test_pairs_of_a_prompt_are_averaged_first_so_that_only_prompts_are_independent():
    by_prompt = np.random.default_rng(0).integers(0, 2, 50).astype(float)
    repeated = np.repeat(by_prompt[:, None, None], 6, axis=1).repeat(4, axis=2)  # [B, K, K]
    assert win_rate(repeated) == win_rate(by_prompt)


def test_swapping_the_sides_mirrors_the_estimate():
    wins = np.random.default_rng(3).random(40)
    ours, theirs = win_rate(wins), win_rate(1 - wins)
    assert (ours.value, ours.low, ours.high) == pytest.approx(
        (1 - theirs.value, 1 - theirs.high, 1 - theirs.low)
    )


def test_winning_always_is_certain():
    found = win_rate(np.ones((7, 2)))
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
