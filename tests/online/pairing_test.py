"""Pairings and targets on made candidates, against cases counted by hand."""

import collections

import numpy as np
import pytest

from paxo.judges import CheckedJudge
from paxo.online import targets
from paxo.online.groups import Prompt
from paxo.online.judging import Bench
from paxo.online.pairing import (
    EQUAL,
    NO_PAIR,
    TIE,
    UNFINISHED,
    UNJUDGED,
    Chosen,
    accepted_pairs,
    all_candidates,
    best_and_worst,
    every_candidate,
    filtered,
    given_pair,
    margin_pairs,
    ordered_pair,
    pairs,
    tournament,
)


def rng():
    return np.random.default_rng(0)


class StrengthJudge:
    """The stronger wins with `win`, equals tie, 100 and more is not judged. Counts questions."""

    def __init__(self, win=1.0):
        self.win, self.asked = win, 0

    def __call__(self, prompts, rows, wanted=None):
        self.asked += len(prompts) * int(np.triu(wanted | wanted.T, 1).sum())
        s = np.array([[float(c[0]) if c[0] < 100 else np.nan for c in row] for row in rows])
        ours, theirs = s[:, :, None], s[:, None]
        p = np.where(ours == theirs, 0.5, np.where(ours > theirs, self.win, 1 - self.win))
        p = np.where(np.isnan(ours + theirs), np.nan, p)
        p[:, range(p.shape[1]), range(p.shape[1])] = 0.5
        return p


def bench_of(strengths, *, finished=None, judge=None, sources=None, rewards=None, **given):
    """Candidates whose only token is their strength; 100 and more cannot be judged."""
    strengths = np.asarray(strengths)
    tokens = [[np.array([s], np.int32) for s in row] for row in strengths]
    finished = np.ones(strengths.shape, bool) if finished is None else np.asarray(finished)
    reward = lambda prompts, rows: np.array([[float(c[0]) for c in row] for row in rows])  # noqa: E731
    return Bench(
        [Prompt(np.array([7]), 10 + b) for b in range(len(strengths))],
        tokens,
        finished,
        sources or ["policy"] * strengths.shape[1],
        judge=CheckedJudge(judge or StrengthJudge(), missing="keep"),
        rewards={"reward": reward, "points": reward} if rewards is None else rewards,
        **given,
    )


def found(chosen):
    return list(zip(chosen.prompt.tolist(), chosen.indices.tolist()))


def test_pairs_put_the_winner_first_and_leave_out_what_has_none():
    bench = bench_of(
        [[1, 2], [5, 4], [3, 3], [100, 1], [1, 2]],
        finished=[[True, True]] * 4 + [[True, False]],
        allow_unfinished=False,
    )
    chosen = pairs("winner")(bench, rng())
    assert found(chosen) == [(0, [1, 0]), (1, [0, 1])]
    assert chosen.skipped == {EQUAL: 1, UNJUDGED: 1, UNFINISHED: 1}


def test_a_tie_of_different_answers_is_left_out_by_winner_and_drawn_by_chance():
    even = StrengthJudge(win=0.5)
    assert pairs("winner")(bench_of([[1, 2]], judge=even), rng()).skipped == {TIE: 1}
    many = pairs("drawn")(bench_of([[1, 2]] * 400, judge=even), rng())
    share = np.mean(many.indices[:, 0] == 0)
    assert abs(share - 0.5) < 4 * 0.5 / 20


def test_drawn_pairs_are_first_as_often_as_the_judge_says():
    many = pairs("drawn")(bench_of([[2, 1]] * 1600, judge=StrengthJudge(win=0.8)), rng())
    share = np.mean(many.indices[:, 0] == 0)
    assert abs(share - 0.8) < 4 * 0.4 / 40
    with pytest.raises(ValueError, match="order must be none, winner or drawn; got 'best'"):
        pairs("best")


def test_pairs_are_independent_and_as_drawn_where_nobody_is_asked():
    judge = StrengthJudge()
    bench = bench_of([[1, 2, 3, 3, 9]], judge=judge)
    assert found(pairs()(bench, rng())) == [(0, [0, 1]), (0, [2, 3])]  # the odd one has no partner
    assert judge.asked == 0
    assert pairs().size == 2


def test_a_length_limit_that_cut_nobody_and_empty_completions():
    bench = bench_of([[1, 2]], finished=[[False, False]])
    assert len(pairs()(bench, rng()).prompt) == 1  # allowed unless it is forbidden
    bench.eligible[0, 0] = False
    assert pairs()(bench, rng()).skipped == {UNFINISHED: 1}


def test_best_and_worst_by_wins_with_ties_nan_and_equal_answers():
    bench = bench_of(
        [[2, 9, 1, 5], [4, 4, 4, 4], [100, 101, 102, 1], [3, 100, 3, 3], [6, 7, 8, 9]],
        finished=[[True] * 4] * 4 + [[False, False, False, True]],
        allow_unfinished=False,
    )
    chosen = best_and_worst()(bench, rng())
    # Prompts 2 and 3: every candidate was compared with one that nobody could judge.
    assert found(chosen) == [(0, [1, 2])]
    assert chosen.skipped == {EQUAL: 1, UNJUDGED: 2, UNFINISHED: 1}
    tied = best_and_worst()(bench_of([[1, 2]], judge=StrengthJudge(win=0.5)), rng())
    assert tied.skipped == {TIE: 1}


def test_best_and_worst_by_a_reward_that_may_fail():
    def reward(prompts, rows):
        return np.array([[np.nan if c[0] > 9 else c[0] for c in row] for row in rows], float)

    reward.may_fail = True
    bench = bench_of([[10, 3, 7, 5], [11, 12, 13, 4]], rewards={"reward": reward})
    chosen = best_and_worst("reward")(bench, rng())
    assert found(chosen) == [(0, [2, 1])]
    assert chosen.skipped == {UNJUDGED: 1}
    assert bench.counts["candidates without 'reward'"] == 4
    reward.may_fail = False
    bench = bench_of([[10, 3]], rewards={"reward": reward})
    with pytest.raises(
        ValueError, match=r"reward 'reward', prompt 10, candidate 0: got nan \(1 of 2"
    ):
        bench.rewards("reward")


def test_the_rest_follows_best_and_worst():
    bench = bench_of([[2, 9, 1, 5]], finished=[[True, True, True, False]], allow_unfinished=False)
    pairing = best_and_worst(rest=True)
    assert found(pairing(bench, rng())) == [(0, [1, 2, 0, -1])]
    assert not hasattr(pairing, "size")


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_a_tournament_finds_the_best_and_a_loser_of_the_first_round(size):
    order = np.random.default_rng(size).permutation(size)[None].repeat(3, 0)
    judge = StrengthJudge(win=0.9)
    (_, (best, worst)), *_ = found(tournament(bench_of(order, judge=judge), rng()))
    assert order[0, best] == size - 1
    assert order[0, worst] == 0  # the weakest of all loses its first match too
    # One less where best and worst have met before.
    assert judge.asked in [3 * n for n in {2: [1], 3: [3], 5: [6, 7], 8: [10, 11]}[size]]


def test_a_tournament_asks_eleven_comparisons_of_eight_and_never_one_twice():
    judge, bench = StrengthJudge(), bench_of([list(range(8))])
    bench._judge = CheckedJudge(judge, missing="keep")
    tournament(bench, rng())
    assert judge.asked == bench.counts["comparisons"] == 11
    tournament(bench, rng())
    assert judge.asked == 11


def test_a_tournament_leaves_out_unanswered_unfinished_and_equal():
    bench = bench_of(
        [[1, 2, 3, 4], [100, 2, 3, 4], [5, 5, 5, 5], [9, 8, 7, 1], [9, 8, 7, 1]],
        finished=[[True] * 4] * 3 + [[True, True, True, False], [False, False, False, True]],
        allow_unfinished=False,
    )
    chosen = tournament(bench, rng())
    assert found(chosen)[0] == (0, [3, 0])
    assert chosen.skipped[UNJUDGED] == 1
    assert chosen.skipped[EQUAL] == 1
    # One that may not be trained on is the worst of prompt 3; in prompt 4 too few are left.
    assert chosen.skipped[UNFINISHED] == 2
    with pytest.raises(ValueError, match="at least 2 candidates; got 1"):
        tournament(bench_of([[1]]), rng())


def test_a_worst_that_the_judge_prefers_is_no_pair():
    class Fickle(StrengthJudge):
        calls = 0

        def __call__(self, prompts, rows, wanted=None):
            self.calls += 1
            p = super().__call__(prompts, rows, wanted)
            return p if self.calls < 4 else 1 - p  # the fourth question is the final one

    assert tournament(bench_of([[1, 2, 3, 4]], judge=Fickle()), rng()).skipped == {TIE: 1}


def test_margin_pairs_have_a_good_winner_and_a_loser_far_below():
    sources = ["policy", "policy", "data"]
    bench = bench_of(
        [[6, 5, 2], [4, 3, 1], [5, 4, 6], [4, 3, 5], [5, 5, 5], [5, 5, 6]], sources=sources
    )
    chosen = margin_pairs()(bench, rng())
    by_prompt = dict(found(chosen))
    assert by_prompt[0][0] == 0  # the policy's own winner: 1 point is enough
    assert by_prompt[0][1] in (1, 2)
    assert 1 not in by_prompt  # nobody is good
    assert by_prompt[2] == [2, 1]  # the teacher's winner wants 2 points
    assert by_prompt[3] == [2, 1]
    assert 4 not in by_prompt
    assert 5 not in by_prompt  # only 1 point below the teacher
    assert chosen.skipped == {NO_PAIR: 3}


def test_filters_of_pf_ppo():
    bench = bench_of([[3, 9, 1, 5]])
    assert found(filtered("best_worst")(bench, rng())) == [(0, [1, 2])]
    assert found(filtered("best")(bench, rng())) == [(0, [1])]
    seen = {
        found(filtered("best_random")(bench, np.random.default_rng(i)))[0][1][1] for i in range(30)
    }
    assert seen == {0, 2, 3}
    same = bench_of([[4, 4, 4]])
    assert found(filtered("best_worst")(same, rng())) == [(0, [0, 1])]
    with pytest.raises(ValueError, match="rule must be best_worst, best_random or best"):
        filtered("worst")


def test_accepted_pairs_are_the_best_when_the_temperature_is_low():
    bench = bench_of([[1, 8, 3, 7, 8, 2]])
    (pair,) = found(accepted_pairs(num=2, beta=1e-3)(bench, rng()))
    assert pair == (0, [1, 3])  # the second 8 is a duplicate
    few = accepted_pairs(num=4, beta=1.0)(bench_of([[5, 5, 5, 2]]), rng())
    assert found(few) == [(0, [0, 3])]
    assert few.skipped == {EQUAL: 1}
    with pytest.raises(ValueError, match="num must be even and at least 2; got 3"):
        accepted_pairs(num=3)


def test_accepted_pairs_are_ordered_by_the_judge_not_by_the_reward():
    against = lambda prompts, rows: -np.array([[float(c[0]) for c in row] for row in rows])  # noqa: E731
    bench = bench_of([[1, 2]], rewards={"reward": against})
    assert found(accepted_pairs(num=2, beta=10.0)(bench, rng())) == [(0, [1, 0])]


def test_ordered_and_given_pairs_have_the_others_behind_them():
    finished = [[True, True, True, False, True]]
    bench = bench_of([[1, 2, 3, 4, 5]], finished=finished, allow_unfinished=False)
    assert found(ordered_pair(bench, rng())) == [(0, [1, 0, 2, 4, -1])]
    assert found(given_pair(bench, rng())) == [(0, [0, 1, 2, 4, -1])]
    bench.eligible[0, 0] = False
    assert given_pair(bench, rng()).skipped == {UNFINISHED: 1}


def test_all_candidates_and_every_one():
    finished = [[True, True, False], [False, True, False], [False] * 3]
    bench = bench_of([[1, 2, 3]] * 3, finished=finished, allow_unfinished=False)
    assert found(all_candidates(bench, rng())) == [(0, [0, 1, -1])]
    assert found(every_candidate(bench, rng())) == [(0, [0, 1, -1]), (1, [1, -1, -1])]
    assert every_candidate(bench, rng()).skipped == {UNFINISHED: 1}


# --- comparisons are asked once ---


def test_a_comparison_is_asked_once_in_whichever_order():
    judge = StrengthJudge(win=0.75)
    bench = bench_of([[1, 2, 3], [3, 2, 1]], judge=judge)
    p = bench.beats(np.array([[1], [0]]), np.array([[0], [1]]))
    np.testing.assert_array_equal(p, [[0.75], [0.75]])
    assert judge.asked == 2
    np.testing.assert_array_equal(bench.beats(np.array([[0], [1]]), np.array([[1], [0]])), 1 - p)
    assert judge.asked == 2
    whole = bench.among_candidates()
    assert judge.asked == bench.counts["comparisons"] == 2 + 2 * 2
    bench.among_candidates()
    assert judge.asked == 6
    np.testing.assert_array_equal(whole + whole.swapaxes(1, 2), np.ones((2, 3, 3)))


def test_opponents_are_only_played_against():
    judge = StrengthJudge()
    bench = bench_of([[1, 4, 2, 3]], judge=judge, num_opponents=2)
    np.testing.assert_array_equal(bench.against_opponents(), [[[0.0, 0.0], [1.0, 1.0]]])
    assert bench.num_candidates == 2
    assert judge.asked == 4
    assert found(all_candidates(bench, rng())) == [(0, [0, 1])]


# --- targets ---


def chosen_of(*rows):
    return Chosen(np.arange(len(rows)), np.array(rows), collections.Counter())


def test_labels_are_hard_or_how_often_each_wins():
    bench = bench_of([[1, 2], [2, 1]], judge=StrengthJudge(win=0.75))
    chosen = chosen_of([1, 0], [1, 0])
    assert targets.hard_labels(bench, chosen)["labels"].tolist() == [[1, 0], [1, 0]]
    assert targets.soft_labels(bench, chosen)["labels"].tolist() == [[0.75, 0.25], [0.25, 0.75]]


def test_win_rates_are_against_opponents_or_all_with_itself_as_a_half():
    among = targets.win_rates(bench_of([[1, 2, 3]]), chosen_of([2, 0]))["win_rates"]
    np.testing.assert_allclose(among, [[2.5 / 3, 0.5 / 3]])
    against = bench_of([[1, 3, 2, 3]], num_opponents=2)
    rates = targets.win_rates(against, chosen_of([0, 1]))["win_rates"]
    np.testing.assert_allclose(rates, [[0.0, 0.75]])


def test_preference_scores_are_mean_logits_and_finite_for_sure_wins():
    bench = bench_of([[1, 2]], judge=StrengthJudge(win=0.8))
    scores = targets.preference_scores(bench, chosen_of([0, 1]))["preference_scores"]
    np.testing.assert_allclose(scores, [[-np.log(4) / 2, np.log(4) / 2]])
    sure = targets.preference_scores(bench_of([[1, 2]]), chosen_of([0, 1]))["preference_scores"]
    assert np.isfinite(sure).all()


def test_spo_rewards_leave_out_itself_and_sum_to_half_their_number():
    bench = bench_of([[1, 2, 3], [1, 100, 2]], judge=StrengthJudge(win=0.75))
    rewards = targets.wins_as_rewards(bench, chosen_of([0, 1, 2], [0, 1, 2]))["rewards"]
    np.testing.assert_allclose(rewards[0], [0.25, 0.5, 0.75])
    assert rewards[0].sum() == 1.5
    assert np.isnan(rewards[1]).all()  # collect leaves such groups out


def test_advantages_leave_one_out_within_the_group():
    bench = bench_of([[1, 2, 6, 9]])
    found_ = targets.leave_one_out()(bench, chosen_of([0, 1, 2, -1]))["advantages"]
    np.testing.assert_allclose(found_[0, :3], [1 - 4, 2 - 3.5, 6 - 1.5])


def test_maxmin_trains_on_the_group_of_users_that_is_worst_off():
    rewards = {
        "young": lambda prompts, rows: np.full((1, 2), 3.0),
        "old": lambda prompts, rows: np.array([[1.0, 2.0]]),
    }
    bench = bench_of([[1, 2]], rewards=rewards)
    assert targets.lowest_mean_reward(bench, chosen_of([1, 0]))["rewards"].tolist() == [[2.0, 1.0]]
    wide = {"many": lambda prompts, rows: np.zeros((1, 2, 3))}
    with pytest.raises(ValueError, match="'many' gives 3 numbers a candidate; a group of users"):
        targets.lowest_mean_reward(bench_of([[1, 2]], rewards=wide), chosen_of([0, 1]))


def test_constraints_judgements_baselines_and_marks():
    rewards = {
        "constraints": lambda prompts, rows: np.arange(6.0).reshape(1, 3, 2),
        "passed": lambda prompts, rows: np.array([[[1, 1], [1, 0], [0, 0]]]),
        "reward": lambda prompts, rows: np.array([[1.0, 2.0, 5.0]]),
    }
    sources = ["policy", "data", "reference"]
    bench = bench_of([[1, 2, 3]], rewards=rewards, sources=sources, num_opponents=1)
    chosen = chosen_of([1, 0])
    wide = targets.constraints()(bench, chosen)["constraint_rewards:KD"]
    np.testing.assert_array_equal(wide, [[[2, 3], [0, 1]]])
    assert targets.judgements()(bench, chosen)["passed"].tolist() == [[0.0, 1.0]]
    assert targets.baseline()(bench, chosen)["baseline_rewards"].tolist() == [[5.0, 5.0]]
    assert targets.marks("data")(bench, chosen)["samples"].tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("answer", [np.zeros(2), np.zeros((1, 3)), np.zeros((1, 2, 3, 4))])
def test_rewards_of_another_shape_are_refused(answer):
    bench = bench_of([[1, 2]], rewards={"r": lambda prompts, rows: answer})
    with pytest.raises(
        ValueError, match=r"reward 'r': expected shape \(1, 2\), \[B, N\] for 1 pro"
    ):
        bench.rewards("r")
