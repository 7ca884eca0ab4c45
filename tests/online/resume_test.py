"""A run that is stopped anywhere goes on to the same bits: parameters, anchors, files, metrics."""

import functools
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from paxo.online import RoundError, RoundSettings, method
from paxo.online.round_files import RoundFiles
from paxo.training.checkpoint import BUCKET, Checkpointer, checkpoint_folder
from paxo.training.writers import TIMING_KEYS, JsonlWriter
from tests.compiling import quick_compiles  # noqa: F401
from tests.made_run import PROJECT
from tests.online import killed, playing

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROUNDS = 4
# Mechanism -> row, its settings, epochs, minibatches, and the step after which SIGTERM stops it.
MECHANISMS = {
    "plain": ("online_dpo", {}, 2, 2, 10),
    "extragradient": ("egpo", {"beta": 0.5}, 1, 1, 3),
    "optimistic": ("onpo", {}, 2, 1, 10),  # between a round's two fits
    "extrapolation": ("apo", {"draws": (4,)}, 1, 2, 6),  # all of a round but its look-ahead
    "average": ("nash_ema_pg", {"average": 0.5}, 2, 1, 6),
    "moving reference": ("comal", {"eta": 1.0, "tau": 0.3, "reference_every": 2}, 1, 2, 5),
    "replay": ("dno_prct", {}, 1, 2, 5),
    "token rewards": ("ppo", {}, 1, 2, 5),
}


class Failing:
    """Judges until the n-th question."""

    def __init__(self, inner, at=None, count=None):
        self.inner, self.at, self.count = inner, at, [0] if count is None else count

    def __call__(self, *args, **given):
        self.count[0] += 1
        if self.count[0] == self.at:
            raise ConnectionError("the judge is gone")
        return self.inner(*args, **given)


class Stopping(JsonlWriter):
    """Does something when the metrics of a step come in."""

    def __init__(self, path, at=None, do=None):
        super().__init__(path)
        self.at, self.do = at, do

    def write(self, step, metrics):
        super().write(step, metrics)
        if step == self.at and "loss" in metrics:
            self.do()


def stop():
    raise RuntimeError("stopped")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def attempt(workdir, mechanism, *, fail_at=None, stop_at=None, do=None):
    """One attempt at a run; the number of questions asked and what came out."""
    name, settings, epochs, minibatches, _ = MECHANISMS[mechanism]
    game, count = playing.a_game(), [0]
    judges = playing.judges_of(game)
    failing = functools.partial(Failing, at=fail_at, count=count)
    judges = playing.judges_of(
        game,
        judge=failing(judges.judge),
        rewards={name: failing(reward) for name, reward in judges.rewards.items()},
    )

    def make_writer(step, rounds):
        writer = Stopping(workdir / "metrics.jsonl", stop_at, do)
        writer.truncate_after(step or -1, rounds)
        return writer

    with Checkpointer(checkpoint_folder(workdir), every=2, keep=2) as saver:
        result = playing.play_game(
            game,
            method(name, **settings),
            workdir,
            settings=RoundSettings(
                ROUNDS, prompts_per_round=12, epochs=epochs, minibatches=minibatches
            ),
            judges=judges,
            optimizer=optax.adam(0.05),
            checkpointer=saver,
            make_writer=make_writer,
            evaluate=lambda params, last, number: {"first": float(params["logits"][0, 0])},
        )
    return count[0], result


def everything(workdir, result):
    """All that must be the same, to the bit."""
    arrays = jax.tree.leaves(
        (result.state.params, result.state.opt_state, result.state.step, result.anchors)
    )
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    rounds = RoundFiles(workdir).folder
    return {
        "arrays": [np.asarray(x).tobytes() for x in arrays],
        "files": {p.name: p.read_text() for p in sorted(rounds.iterdir())},
        "metrics": [{k: v for k, v in x.items() if k not in TIMING_KEYS} for x in lines],
    }


QUICK = {"extragradient", "optimistic", "replay"}


@pytest.mark.parametrize(
    "mechanism",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MECHANISMS],
)
def test_a_run_that_fails_in_every_way_ends_with_the_same_bits(mechanism, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    questions, result = attempt(whole, mechanism)
    expected = everything(whole, result)
    terminated_at = MECHANISMS[mechanism][-1]

    with pytest.raises(RoundError, match="the judge is gone"):
        attempt(broken, mechanism, fail_at=questions // 2)
    with pytest.raises(RuntimeError, match="stopped"):  # after a checkpoint, within the round
        attempt(broken, mechanism, stop_at=terminated_at - 1, do=stop)
    with pytest.raises(SystemExit) as ended:
        attempt(broken, mechanism, stop_at=terminated_at, do=terminate)
    assert ended.value.code == 143
    # Metrics of a step are told one step late, but for the last of a fit.
    steps = sorted(int(p.name) for p in (broken / "checkpoints").iterdir())
    assert steps[-1] in (terminated_at, terminated_at + 1)
    with pytest.raises(RoundError, match="the judge is gone"):  # before there is a new checkpoint
        attempt(broken, mechanism, fail_at=1)
    _, result = attempt(broken, mechanism)
    assert everything(broken, result) == expected
    rounds = [line["round"] for line in expected["metrics"] if "round" in line]
    assert rounds == list(range(1, ROUNDS + 1))


def test_a_machine_that_has_only_the_bucket_goes_on_to_the_same_bits(tmp_path):
    # Later rounds are trained on the files of earlier ones too.
    questions, result = attempt(tmp_path / "whole", "replay")
    expected = everything(tmp_path / "whole", result)
    machines = [tmp_path / name for name in ("first", "second")]
    for machine in machines:
        machine.mkdir()
        (machine / BUCKET).write_text(f"{tmp_path / 'bucket'}\n")
    with pytest.raises(RuntimeError, match="stopped"):
        attempt(machines[0], "replay", stop_at=MECHANISMS["replay"][-1], do=stop)
    assert {path.name for path in machines[0].iterdir()} == {BUCKET, "metrics.jsonl"}
    asked_again, result = attempt(machines[1], "replay")
    assert 0 < asked_again < questions
    found = everything(machines[1], result)
    assert (found["arrays"], found["files"]) == (expected["arrays"], expected["files"])


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_phase_of_a_round_ends_with_the_same_bits(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = everything(whole, killed.attempt(whole))
    finished = subprocess.run(
        [sys.executable, "-m", "tests.online.killed", broken],
        cwd=PROJECT, capture_output=True, text=True,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # as here, to the bit
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.split() == [phase for phase, _ in killed.KILLED]
    assert everything(broken, killed.attempt(broken)) == expected


def test_a_run_that_is_over_does_nothing_more(tmp_path):
    attempt(tmp_path, "replay")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    questions, _ = attempt(tmp_path, "replay")
    assert questions == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
