"""The policy as its own judge: what it is asked, what is read, and what is no score."""

import jax
import numpy as np
import pytest

from paxo.games.as_policy import stop_ids
from paxo.online import Drawer, Drawn, SelfReward
from paxo.online.self_reward import TEMPLATE, points
from paxo.sampling import SamplingConfig
from tests.online import playing


class Replies:
    """Draws replies by the number of the question; token n stands for n points, 9 for babble."""

    max_prompt = None

    def __init__(self, replies):
        self.replies, self.asked = replies, []

    def __call__(self, draw, policies, prompts, key):
        self.asked += [(draw, p.ids.tolist(), p.index) for p in prompts]
        tokens = [[np.array([t]) for t in self.replies[p.index]] for p in prompts]
        return Drawn(tokens, np.ones((len(prompts), draw.count), bool), None)


def decode(ids):
    return "babble" if ids[0] == 9 else f"It is fine. Score: {ids[0]}"


def made(replies, **given):
    drawer = Replies(replies)
    asked = []

    def encode(text):
        asked.append(text)
        return [len(asked)] * 2

    return drawer, asked, SelfReward(drawer, encode, decode, **given)


def test_a_reward_is_the_mean_of_what_could_be_read_and_never_a_made_up_number(caplog):
    drawer, asked, judge = made([[4, 5, 3], [9, 9, 2], [9, 9, 9], [0, 9, 0]])
    reward = judge.of_policy({"w": 1}, jax.random.key(0))
    found = reward(["Why?", "How?"], [["A", "B"], ["C", "D"]])
    np.testing.assert_array_equal(found, [[4.0, 2.0], [np.nan, 0.0]])
    assert reward.may_fail
    assert "6 of 12 judgements without a score; 0 of 4 questions too long" in caplog.text
    assert [index for _, _, index in drawer.asked] == [0, 1, 2, 3]
    assert {draw.count for draw, _, _ in drawer.asked} == {3}
    assert "Question: How?" in asked[2]
    assert "Answer: C" in asked[2]


def test_braces_in_texts_are_left_alone():
    _, asked, judge = made([[1]], draws=1, template="{prompt} / {completion}")
    judge.of_policy({}, None)(["{completion} {x}"], [["{0}"]])
    assert asked == ["{completion} {x} / {0}"]


def test_a_question_that_is_too_long_is_counted_and_not_asked(caplog):
    drawer, _, judge = made([[5, 5, 5]] * 2)
    drawer.max_prompt = 1
    found = judge.of_policy({}, None)(["Why?"], [["A", "B"]])
    assert np.isnan(found).all()
    assert not drawer.asked
    assert "2 of 2 questions too long to be asked" in caplog.text


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Score: 4", 4.0),
        ("score: **3.5**", 3.5),
        ("Score: 1. No, wait. Score: 2", 2.0),
        ("Score: 6", None),
        ("Score: -1", None),
        ("Score: five", None),
        ("", None),
    ],
)
def test_points_are_read_from_the_last_score_within_the_scale(reply, value):
    assert points(reply) == value


def test_the_question_names_five_points_and_how_to_end():
    assert [f"{n}." in TEMPLATE for n in range(1, 6)] == [True] * 5
    assert '"Score: "' in TEMPLATE
    with pytest.raises(ValueError, match=r"template has no \{completion\}"):
        SelfReward(None, None, None, template="{prompt}")
    with pytest.raises(ValueError, match="draws must be at least 1; got 0"):
        SelfReward(None, None, None, draws=0)
    with pytest.raises(TypeError, match="call of_policy"):
        SelfReward(None, None, None)(["p"], [["c"]])


def test_the_policy_that_answers_is_the_one_that_judges():
    """On a game the judge's word is one action; a policy that is sure of it always gives it."""
    game = playing.a_game()
    policy, params = playing.policy_of(game)
    drawer = Drawer(policy, SamplingConfig(1), stop_ids(game), batch_size=4)
    judge = SelfReward(drawer, lambda text: [0], lambda ids: f"Score: {ids[0]}")
    for action in (1, 3):
        sure = params | {"logits": params["logits"].at[0, action].set(50.0)}
        found = judge.of_policy(sure, jax.random.key(0))(["p"], [["a", "b", "c"]])
        np.testing.assert_array_equal(found, np.full((1, 3), float(action)))
    spread = judge.of_policy(params, jax.random.key(0))(["p"] * 8, [["a"] * 4] * 8)
    assert len(np.unique(spread)) > 3  # every completion has draws of its own
