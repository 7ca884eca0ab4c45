"""What is drawn for, what judges are shown, and what is trained on."""

import dataclasses

import jax
import numpy as np
import pytest

from paxo.online import METHODS, Drawn, Judges, Prompt, collect, method
from tests.online import playing

POLICIES = {"policy": {}, "reference": {}, "average": {}}


class Drawing:
    """Draws tokens 100, 101, ... and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, draw, policies, prompts, key, *, mix=0.0):
        self.asked.append((draw, [p.ids.tolist() for p in prompts], mix))
        tokens = [[np.array([100 + k, 2]) for k in range(draw.count)] for _ in prompts]
        shape = (len(prompts), draw.count)
        return Drawn(tokens, np.ones(shape, bool), np.full(shape, -1.5, np.float32))


def prompts_with(num, answer):
    ids = np.array([7, 8], np.int32)
    return [
        Prompt(ids, i, f"prompt {i}", (np.array(answer, np.int32),), (True,)) for i in range(num)
    ]


def test_a_reset_prompt_has_a_part_of_its_answer_behind_it_that_judges_see_and_losses_do_not():
    shown, answer, drawing = [], [11, 12, 13, 2], Drawing()

    def reward(prompts, rows):
        shown.extend(zip(prompts, [row[0] for row in rows]))
        return np.zeros((len(rows), 1))

    judges = Judges(rewards={"reward": reward})
    prompts = prompts_with(40, answer)
    found = collect(METHODS["dr_po"], prompts, POLICIES, drawing, judges, jax.random.key(0))
    lengths = set()
    for group, ids, (prompt, text) in zip(found.groups, drawing.asked[0][1], shown):
        prefix = group.prompt.tolist()[2:]
        lengths.add(len(prefix))
        assert group.prompt.tolist() == ids == [7, 8, *answer[: len(prefix)]]
        assert [c.tolist() for c in group.completions] == [[100, 2]]  # the policy's own tokens
        assert list(text) == [*prefix, 100, 2]
        assert prompt == f"prompt {group.index}"
    assert lengths == {1, 2, 3}  # never nothing, never all of it


@pytest.mark.parametrize(("reset", "least", "most"), [(0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)])
def test_prompts_are_reset_with_the_rows_probability(reset, least, most):
    judges = Judges(rewards={"reward": lambda prompts, rows: np.zeros((len(rows), 1))})
    found = collect(
        method("dr_po", reset=reset), prompts_with(200, [11, 12, 2]), POLICIES, Drawing(), judges,
        jax.random.key(1),
    )  # fmt: skip
    assert least <= sum(len(group.prompt) > 2 for group in found.groups) <= most


def test_an_answer_of_one_token_leaves_nothing_to_start_from():
    judges = Judges(rewards={"reward": lambda prompts, rows: np.zeros((len(rows), 1))})
    found = collect(
        METHODS["dr_po"], prompts_with(3, [2]), POLICIES, Drawing(), judges, jax.random.key(1)
    )
    assert all(group.prompt.tolist() == [7, 8] for group in found.groups)


def test_candidates_of_the_data_set_stand_where_the_row_says_and_are_finished_as_they_are():
    row, drawing = METHODS["hypo"], Drawing()
    prompts = [
        dataclasses.replace(
            p, completions=(np.array([5, 2]), np.array([6])), finished=(True, False)
        )
        for p in prompts_with(2, [1])
    ]
    found = collect(row, prompts, POLICIES, drawing, Judges(), jax.random.key(0))
    for group in found.groups:
        assert [c.tolist() for c in group.completions] == [[5, 2], [6], [100, 2], [101, 2]]
        assert group.finished == (True, False, True, True)
        assert group.extras["samples"].tolist() == [0, 0, 1, 1]
        assert group.labels == (1, 0, 0, 0)
    assert found.figures["entropy_nats"] == 1.5
    assert found.figures["tokens"] == 2.0


def test_opponents_come_from_the_policies_that_are_given_for_them():
    seen = []

    class Naming(Drawing):
        def __call__(self, draw, policies, prompts, key, *, mix=0.0):
            seen.append((draw.source, policies["policy"], mix))
            return super().__call__(draw, policies, prompts, key, mix=mix)

    def judge(prompts, rows, wanted=None):
        assert {len(row) for row in rows} == {3}
        return np.full((len(rows), 3, 3), 0.5)

    row = method("nash_md", mix=0.25)
    collect(
        row, prompts_with(2, [1]), {"policy": "live", "reference": 0}, Naming(), Judges(judge),
        jax.random.key(0), opponents={"policy": "half", "reference": 0},
    )  # fmt: skip
    assert seen == [("policy", "live", 0.25), ("mixture", "half", 0.25)]


def test_candidates_without_a_reward_are_counted_and_the_others_trained_on():
    def reward(prompts, rows):
        scores = np.tile(np.arange(4.0), (len(rows), 1))
        scores[0, 3] = scores[1, 1:] = np.nan
        return scores

    reward.may_fail = True
    found = collect(
        METHODS["self_rewarding"], prompts_with(3, [1]), POLICIES, Drawing(),
        Judges(rewards={"reward": reward}), jax.random.key(0),
    )  # fmt: skip
    best = [group.completions[0][0] for group in found.groups]
    assert best == [102, 103]  # of prompt 1 too few were scored
    assert found.figures["count/candidates without 'reward'"] == 4
    assert found.figures["skipped/the judge gave up"] == 1
    assert found.figures["reward/reward"] == pytest.approx((0 + 1 + 2 + 0 + 0 + 1 + 2 + 3) / 8)


def test_the_same_key_collects_the_same_and_another_one_does_not():
    game = playing.a_game()
    params = playing.policy_of(game)[1]
    policies = {"policy": params, "reference": params}
    prompts, judges = playing.prompts_for(game, 8), playing.judges_of(game)

    def once(seed):
        found = collect(
            METHODS["online_ipo"], prompts, policies, playing.sampler_of(game, 8), judges,
            jax.random.key(seed),
        )  # fmt: skip
        return [[c.tolist() for c in group.completions] for group in found.groups]

    assert once(0) == once(0)
    assert once(0) != once(1)
