"""Figures of a round, counted by hand, and their plot."""

import matplotlib.image
import numpy as np
import pytest

from paxo.evaluation.duality_gap import duality_gap_estimate
from paxo.evaluation.self_play import (
    PANELS,
    plot_rounds,
    policy_figures,
    preference_figures,
    wanted_comparisons,
)


def table(strengths):
    """`[B, C, C]` the stronger always wins."""
    s = np.asarray(strengths, float)
    return np.where(s[:, :, None] == s[:, None], 0.5, (s[:, :, None] > s[:, None]).astype(float))


# --- the duality gap ---


def test_an_unbeatable_policy_has_no_gap_and_a_beaten_one_all_of_it():
    # One action that beats both others: the policy that plays it has gap 0, any other gap 1.
    best = table([[3, 3, 1, 1]])[:, :, :2]
    worst = table([[1, 1, 3, 3]])[:, :, :2]
    own = np.array([0, 1, -1, -1])
    assert duality_gap_estimate(best, own).value == 0.0
    assert duality_gap_estimate(worst, own).value == 1.0


def test_rock_paper_scissors_of_a_pure_policy_and_of_the_uniform_one():
    matrix = np.array([[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]])
    rng = np.random.default_rng(0)
    challengers = np.tile(np.arange(3), (4000, 1))

    def estimate(policy):
        samples = rng.choice(3, size=(4000, 8), p=policy)
        return duality_gap_estimate(matrix[challengers[:, :, None], samples[:, None, :]])

    assert estimate([1.0, 0, 0]).value == 1.0
    uniform = estimate(np.ones(3) / 3)
    # What is chosen on one half says nothing of the other: the mean gain is 0, luck left out.
    assert uniform.low < 0 < uniform.high
    mixed = estimate([0.6, 0.3, 0.1])  # paper wins 0.6 + 0.15 = 0.75
    assert 0.3 < mixed.value <= 0.5


def test_the_challenger_is_chosen_on_one_half_and_counted_on_the_other():
    # Against sample 0 challenger 0 wins, against sample 1 challenger 1; each loses the other half.
    crossed = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    assert duality_gap_estimate(crossed).value == -1.0
    assert duality_gap_estimate(np.array([[[1.0, 1.0], [0.0, 0.0]]])).value == 1.0


def test_a_comparison_with_itself_and_unanswered_ones_do_not_count():
    # Challenger 0 is sample 0: of it only the comparison with sample 1 is left, on one half.
    itself = np.array([[[0.5, 1.0], [1.0, 1.0]]])
    assert duality_gap_estimate(itself, np.array([-1, -1])).value == 2 * (np.mean([1, 0.5]) - 0.5)
    assert duality_gap_estimate(itself, np.array([0, -1])).value == 1.0
    assert duality_gap_estimate(np.full((3, 2, 2), np.nan)).value == 0.0
    with pytest.raises(ValueError, match=r"\[B, C, E\] with at least 2 samples of the policy; got"):
        duality_gap_estimate(np.zeros((3, 2, 1)))


# --- win rates ---


def test_win_rates_are_those_of_the_policy_against_first_and_last():
    # Two prompts, two completions each: ours beat the first policy's and tie with the last one's.
    strengths = [[3, 3, 1, 1, 3, 3], [2, 2, 2, 1, 3, 1]]
    found = preference_figures(table(strengths), 2)
    assert found["win_rate_first"] == pytest.approx((1 + 0.75) / 2)
    assert found["win_rate_last"] == pytest.approx((0.5 + 0.5) / 2)
    for name in ("win_rate_first", "win_rate_last", "duality_gap"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]


def test_only_wanted_comparisons_are_read():
    p = table(np.random.default_rng(0).integers(0, 4, (5, 6)))
    hidden = np.where(wanted_comparisons(2) | np.eye(6, dtype=bool), p, np.nan)
    assert preference_figures(hidden, 2) == preference_figures(p, 2)
    assert wanted_comparisons(2).sum() == 6 * 2 - 2
    assert "duality_gap" not in preference_figures(p[:, :3, :3], 1)


def test_figures_of_the_policy_are_means_over_its_completions():
    found = policy_figures(
        np.array([0.0, 2.0]), np.array([-3.0, -5.0]), np.array([4, 6]), np.array([True, False])
    )
    assert (found["kl_nats"], found["entropy_nats"]) == (1.0, 4.0)
    assert (found["tokens"], found["finished"]) == (5.0, 0.5)
    assert found["kl_nats_low"] <= 1.0 <= found["kl_nats_high"]


def test_a_plot_has_a_panel_for_each_figure_that_there_is(tmp_path):
    history = [
        {"round": n, "win_rate_first": 0.5 + 0.1 * n, "win_rate_first_low": 0.4,
         "win_rate_first_high": 0.9, "kl_nats": 0.1 * n, "mine": 1.0}
        for n in (1, 2, 3)
    ]  # fmt: skip
    sizes = {}
    for name, panels in (("usual", PANELS), ("more", {**PANELS, "mine": "mine", "a": "a"})):
        path = tmp_path / f"{name}.png"
        plot_rounds(path, history, panels=panels, exact={"kl_nats": 0.2})
        sizes[name] = matplotlib.image.imread(path).shape
    assert sizes["more"][1] > sizes["usual"][1]  # three panels beside two; "a" is in no line
    assert sizes["more"][0] == sizes["usual"][0]
