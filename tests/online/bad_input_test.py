"""Judges, rewards, samplers and files that fail: named, counted, nothing half-written."""

import dataclasses
import json
import re
import socket

import jax
import numpy as np
import pytest

from paxo.games.as_policy import stop_ids
from paxo.judges import CheckedJudge, Endpoint, LanguageModelJudge
from paxo.online import METHODS, Draw, Drawer, Drawn, RoundError, RoundSettings, method
from paxo.online.round_files import RoundFiles
from paxo.sampling import SamplingConfig
from paxo.training.checkpoint import Checkpointer
from tests.compiling import quick_compiles  # noqa: F401
from tests.online import playing

pytestmark = pytest.mark.usefixtures("quick_compiles")


def checked(function):
    return CheckedJudge(function, name="made", missing="keep")


def right(prompts, rows, wanted=None):
    return playing.judge_of(playing.a_game())(prompts, rows, wanted=wanted)


def unanswered(share):
    """Gives up on that share of the prompts, the first ones."""

    def judge(prompts, rows, wanted=None):
        p = np.array(right(prompts, rows, wanted))
        p[: round(share * len(p))] = np.nan
        return p

    return checked(judge)


def raising(prompts, rows, wanted=None):
    raise ConnectionError("no route to host")


def lopsided(prompts, rows, wanted=None):
    p = np.array(right(prompts, rows, wanted))
    p[:, 0, 1] = p[:, 1, 0] = 0.6
    return p


def dead_endpoint(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", "judge", retries=1, backoff_s=0.01)
    return LanguageModelJudge(endpoint, folder / "replies.sqlite", name="remote")


def nothing_is_kept(workdir):
    return not (workdir / "rounds").exists() or not list((workdir / "rounds").iterdir())


@pytest.mark.parametrize(
    ("make_judge", "told"),
    [
        (lambda folder: unanswered(1.0), "x the judge gave up); nothing"),
        (lambda folder: checked(raising), "ConnectionError: no route to host"),
        (lambda folder: checked(lopsided), "'made', prompt 0, pair (0, 1)"),
        (lambda folder: checked(lambda *a: np.zeros(3)), "expected shape (16, 2, 2)"),
        (lambda folder: checked(dead_endpoint(folder)), "EndpointError"),
    ],
    ids=["gives up", "raises", "P + P' is not 1", "wrong shape", "dead endpoint"],
)
def test_a_judge_that_fails_is_named_and_the_run_goes_on_when_it_works(make_judge, told, tmp_path):
    game, row = playing.a_game(), METHODS["online_dpo"]
    broken = tmp_path / "broken"
    decode = (lambda ids: f"action {ids[0]}") if told == "EndpointError" else tuple
    judges = playing.judges_of(game, judge=make_judge(tmp_path), decode=decode)
    with (
        Checkpointer(broken / "checkpoints", every=1) as saver,
        pytest.raises(RoundError) as caught,
    ):
        playing.play_game(game, row, broken, checkpointer=saver, judges=judges)
    message = str(caught.value)
    assert message.startswith("round 0000: ")
    assert "16 prompts" in message
    assert told in message
    assert "nothing of the round was kept" in message
    assert nothing_is_kept(broken)
    assert not [p for p in (broken / "checkpoints").iterdir() if p.name.isdigit()]
    results = [playing.play_game(game, row, folder) for folder in (broken, tmp_path / "whole")]
    np.testing.assert_array_equal(*(r.state.params["logits"] for r in results))


def test_a_round_that_fails_leaves_a_checkpoint_of_what_was_before_it(tmp_path):
    game, row, asked = playing.a_game(), METHODS["online_dpo"], []

    def judge(prompts, rows, wanted=None):
        asked.append(len(prompts))
        return raising(prompts, rows) if len(asked) == 3 else right(prompts, rows, wanted)

    def attempt():
        with Checkpointer(tmp_path / "checkpoints", every=100) as saver:
            judges = playing.judges_of(game, judge=checked(judge))
            return playing.play_game(
                game, row, tmp_path, rounds=4, judges=judges, checkpointer=saver
            )

    with pytest.raises(RoundError, match="round 0002: 16 prompts were answered, but not judged"):
        attempt()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == ["2"]
    result = attempt()
    assert len(asked) == 5  # two rounds, the one that failed, and the two that were left
    whole = playing.play_game(game, row, tmp_path / "whole", rounds=4)
    np.testing.assert_array_equal(playing.logits_of(result), playing.logits_of(whole))


def test_a_judge_that_gives_up_on_some_is_counted_and_they_are_left_out(tmp_path):
    game, judge = playing.a_game(), unanswered(0.25)
    playing.play_game(
        game, METHODS["inpo_pairs"], tmp_path, rounds=1,
        judges=playing.judges_of(game, judge=judge),
    )  # fmt: skip
    figures = json.loads((tmp_path / "rounds" / "0000.json").read_text())
    assert figures["skipped/the judge gave up"] > 0
    kept = figures["groups"] + sum(v for k, v in figures.items() if k.startswith("skipped/"))
    assert kept == 16
    assert len(playing.rows_of(tmp_path, "0000")) == figures["groups"]


def test_win_rates_that_the_judge_gave_up_on_leave_their_groups_out(tmp_path):
    game = playing.a_game()
    judges = playing.judges_of(game, judge=unanswered(0.25))
    playing.play_game(game, method("online_ipo_v1", beta=0.5), tmp_path, rounds=1, judges=judges)
    figures = json.loads((tmp_path / "rounds" / "0000.json").read_text())
    assert (figures["groups"], figures["skipped/the judge gave up"]) == (12, 4)


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (lambda p, rows: np.full((len(rows), 4), np.nan), "reward 'reward', prompt "),
        (lambda p, rows: np.zeros(len(rows)), "expected shape (16, 4), [B, N] for 16 prompts"),
        (raising, "ConnectionError: no route to host"),
    ],
)
def test_a_reward_that_fails_is_named(reward, told, tmp_path):
    game = playing.a_game()
    judges = playing.judges_of(game, rewards={"reward": reward})
    with pytest.raises(RoundError) as caught:
        playing.play_game(game, METHODS["self_rewarding"], tmp_path, judges=judges)
    assert told in str(caught.value)
    assert nothing_is_kept(tmp_path)


# --- samplers ---


class Drawing:
    """Draws what a function of the number of prompts and of candidates says; checks nothing."""

    def __init__(self, actions, finished=True):
        self.actions, self.finished = actions, finished

    def check(self, prompts):
        pass

    def __call__(self, draw, policies, prompts, key, *, mix=0.0):
        shape = (len(prompts), draw.count)
        actions = np.broadcast_to(self.actions, shape)
        tokens = [[np.array([a], np.int32) for a in row] for row in actions]
        return Drawn(tokens, np.full(shape, self.finished), np.zeros(shape, np.float32))


@pytest.mark.parametrize("name", ["online_dpo", "iterative_dpo", "inpo", "copg", "grpo", "ppo"])
def test_no_finished_candidate_is_named_and_counted(name, tmp_path):
    game = playing.a_game()
    judges = playing.judges_of(game, allow_unfinished=False)
    with pytest.raises(RoundError) as caught:
        playing.play_game(
            game, METHODS[name], tmp_path, judges=judges, draw=Drawing(1, finished=False)
        )
    assert "(16 x too few candidates that may be trained on)" in str(caught.value)
    assert "raise the temperature, max_new_tokens or the number of candidates" in str(caught.value)
    assert nothing_is_kept(tmp_path)


@pytest.mark.parametrize("name", ["online_dpo", "inpo_pairs", "iterative_dpo", "inpo", "rso"])
def test_equal_candidates_are_named_and_counted(name, tmp_path):
    game = playing.a_game()
    with pytest.raises(RoundError) as caught:
        playing.play_game(game, METHODS[name], tmp_path, draw=Drawing(2))
    assert "x all candidates are equal)" in str(caught.value)
    assert nothing_is_kept(tmp_path)


def test_prompts_without_room_for_a_completion_are_refused_before_anything_is_drawn(tmp_path):
    game = playing.a_game()
    policy = dataclasses.replace(playing.policy_of(game)[0], max_positions=3)
    drawer = Drawer(policy, SamplingConfig(2), stop_ids(game))
    asked = playing.prompts_for(game, 16, 2)
    asked[7] = dataclasses.replace(asked[7], ids=np.zeros(2, np.int32))
    with pytest.raises(ValueError) as caught:
        playing.play_game(game, METHODS["online_dpo"], tmp_path, asked=asked, draw=drawer)
    told = "prompt 7 has 2 tokens; with max_new_tokens=2 that exceeds the model's 3 positions"
    assert told in str(caught.value)
    assert nothing_is_kept(tmp_path)
    with pytest.raises(ValueError, match=re.escape(told)):  # whoever draws
        drawer(Draw(), {}, asked, jax.random.key(0))
    # DR-PO draws for a prompt with all but the last token of its answer behind it.
    asked = playing.prompts_for(game, 16, 1)
    asked[3] = dataclasses.replace(asked[3], completions=(np.zeros(3, np.int32),))
    with pytest.raises(ValueError, match="prompt 3 has 3 tokens"):
        playing.play_game(game, METHODS["dr_po"], tmp_path, asked=asked, draw=drawer)


# --- settings ---


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("online_dpo", {"judge": None}, "method 'online_dpo' needs a judge: give judge="),
        ("grpo", {"rewards": {}}, "'grpo' needs the reward function 'reward'; given are []"),
        ("dno_prct", {"rewards": {"reward": len}}, "needs the reward function 'points'; given are"),
        ("maxmin", {"rewards": {}}, "method 'maxmin' needs rewards: give rewards="),
        ("rto", {}, "method 'rto' needs a frozen policy under the role 'dpo': give frozen="),
        ("egpo", {"epochs": 2}, "rounds.epochs and rounds.minibatches must be 1; got 2 and 1"),
        ("online_dpo", {"prompts_per_round": 17}, "prompts_per_round=17, but there are 16 prompts"),
        (
            "selm",
            {"completions": 1},
            "takes 2 completions of each prompt from the data set; prompt",
        ),
        ("dr_po", {"completions": 0}, "takes 1 completions of each prompt from the data set"),
    ],
)
def test_what_is_missing_is_refused_before_anything_is_drawn(name, given, told, tmp_path):
    game = playing.a_game()
    rounds = {k: given.pop(k) for k in ("epochs", "prompts_per_round") if k in given}
    asked = playing.prompts_for(game, 16, given.pop("completions", 2))
    with pytest.raises(ValueError) as caught:
        playing.play_game(
            game,
            METHODS[name],
            tmp_path,
            asked=asked,
            settings=RoundSettings(1, **({"prompts_per_round": 16} | rounds)),
            judges=playing.judges_of(game, **given),
        )
    assert told in str(caught.value)
    assert nothing_is_kept(tmp_path)


def test_fewer_groups_than_minibatches_are_named_and_counted(tmp_path):
    game = playing.a_game()
    settings = RoundSettings(1, prompts_per_round=4, minibatches=4)
    judges = playing.judges_of(game, judge=unanswered(0.75))
    with pytest.raises(RoundError) as caught:
        playing.play_game(game, method("online_ipo_v1"), tmp_path, settings=settings, judges=judges)
    message = str(caught.value)
    assert "1 groups of 4 prompts (3 x the judge gave up) cannot be dealt out to" in message
    assert "rounds.minibatches=4 steps" in message
    assert nothing_is_kept(tmp_path)


# --- files ---


def test_a_damaged_file_of_an_earlier_round_is_named(tmp_path):
    game, row = playing.a_game(), METHODS["dno_prct"]
    playing.play_game(game, row, tmp_path, rounds=1)
    file = tmp_path / "rounds" / "0000.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-5])
    with pytest.raises(ValueError, match=r"0000.jsonl:\d+: not a row of a round's groups"):
        playing.play_game(game, row, tmp_path)
    files = RoundFiles(tmp_path)
    with pytest.raises(RoundError) as caught:
        files.replayed(1, 10, row.schedule, 0)
    assert "round 0001 is trained on groups of round 0000 too" in str(caught.value)
    assert "put the file back, or start in another folder" in str(caught.value)
    file.unlink()
    with pytest.raises(RoundError, match="FileNotFoundError"):
        files.replayed(1, 10, row.schedule, 0)
    playing.play_game(game, row, tmp_path, rounds=1)  # without it, the round is drawn again
    assert file.read_text() == whole


def test_a_round_without_its_figures_is_drawn_again(tmp_path):
    game, row = playing.a_game(), METHODS["online_dpo"]
    playing.play_game(game, row, tmp_path, rounds=1)
    figures = tmp_path / "rounds" / "0000.json"
    before = figures.read_text()
    figures.unlink()
    playing.play_game(game, row, tmp_path, rounds=1)
    assert figures.read_text() == before
    figures.write_text("{")
    with pytest.raises(ValueError, match=r"0000.json: not a round's figures .* remove it"):
        playing.play_game(game, row, tmp_path, rounds=1)
