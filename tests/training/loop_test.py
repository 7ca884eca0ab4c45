"""The training loop on least squares: resuming, stopping, reporting, and when the host waits."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paxo.training import loop
from paxo.training.checkpoint import Checkpointer
from paxo.training.loop import NonFiniteLossError, fit
from paxo.training.writers import TIMING_KEYS, JsonlWriter

OPTIMIZER = optax.adam(0.05)
STEPS = 10
ROWS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The fields of a training state."""

    params: dict
    frozen: dict
    opt_state: tuple
    objective_state: tuple
    step: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Position:
    """Where the next batch begins."""

    epoch: int
    row: int

    def to_dict(self):
        return dataclasses.asdict(self)


class Batches:
    """`ROWS` rows at a time of 12, shuffled anew each epoch; `poison` makes one infinite."""

    def __init__(self, position=None, poison=None):
        self.state = position or Position(0, 0)
        self.identity = ""
        self.taken = 0
        self.poison = poison

    def __next__(self):
        epoch, row = self.state.epoch, self.state.row
        order = np.random.default_rng(epoch).permutation(12)[row : row + ROWS]
        self.identity = f"epoch {epoch}, rows {row}-{row + ROWS - 1}: pairs.jsonl:{order[0]}"
        self.state = Position(epoch, row + ROWS) if row + ROWS < 12 else Position(epoch + 1, 0)
        self.taken += 1
        x = np.sin(np.arange(12.0)[order, None] * np.arange(1.0, 4.0), dtype=np.float32)
        if self.taken == self.poison:
            x = np.full_like(x, np.inf)
        return {"x": x, "y": x @ np.ones(3, np.float32)}


def initial_state():
    params = {"w": jnp.zeros((3,)), "b": jnp.zeros(())}
    return State(params, {}, OPTIMIZER.init(params), (), jnp.int32(0), jax.random.key(0))


def take_step(state, batch):
    key, noise_key = jax.random.split(state.key)

    def loss_of(params):
        noise = 0.01 * jax.random.normal(noise_key, (ROWS,))
        return jnp.mean((batch["x"] @ params["w"] + params["b"] + noise - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "num_tokens": jnp.float32(100)}
    return State(params, {}, opt_state, (), state.step + 1, key), metrics


def least_squares_step():
    return jax.jit(take_step, donate_argnums=0)


def train(workdir, *, every=3, steps=STEPS, **kwargs):
    """Start or go on with a run in a folder, as the default experiment does."""
    with Checkpointer(pathlib.Path(workdir) / "checkpoints", every=every) as saver:
        state, position = initial_state(), Position(0, 0)
        if found := saver.restore_latest(state):
            state, position = found[0], Position(**found[1])
        writer = JsonlWriter(pathlib.Path(workdir) / "metrics.jsonl")
        writer.truncate_after(int(state.step))
        state = fit(
            least_squares_step(),
            state,
            Batches(position),
            num_steps=steps,
            writer=writer,
            checkpointer=saver,
            **kwargs,
        )
        writer.close()
    return state


def lines_without_times(workdir):
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMING_KEYS}
        for line in lines
    ]


def assert_same_run(state, workdir, other_state, other_workdir):
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(other_state.params)):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    lines = lines_without_times(workdir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines == lines_without_times(other_workdir)


def kill_myself(step, _metrics):
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_killed_by_signal_9_goes_on_with_the_same_bits(tmp_path, every):
    root = pathlib.Path(__file__).resolve().parents[2]
    killed = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "killed"), str(every)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = sorted(
        int(path.name)
        for path in (tmp_path / "killed" / "checkpoints").iterdir()
        if path.name.isdigit()
    )
    assert saved
    assert saved[-1] < STEPS
    resumed = train(tmp_path / "killed", every=every)
    whole = train(tmp_path / "whole", every=every)
    assert int(resumed.step) == STEPS
    assert_same_run(resumed, tmp_path / "killed", whole, tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_after_the_current_step_and_the_run_goes_on_later(
    tmp_path, caplog, number, error
):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def interrupt(step, _metrics):
        if step == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(error) as caught:
        train(tmp_path / "stopped", on_step=interrupt)
    assert {n: signal.getsignal(n) for n in before} == before
    if error is SystemExit:
        assert caught.value.code == 128 + signal.SIGTERM
    # Step 4 is reported while step 5 runs, so 5 is the current one; 3 was due.
    checkpoints = tmp_path / "stopped" / "checkpoints"
    assert f"stopped by {number.name} after step 5; a checkpoint is in {checkpoints}" in caplog.text
    assert sorted(path.name for path in checkpoints.iterdir()) == ["3", "5"]
    resumed = train(tmp_path / "stopped")
    assert_same_run(resumed, tmp_path / "stopped", train(tmp_path / "whole"), tmp_path / "whole")


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def interrupt(step, _metrics):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_step=interrupt)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("poison", [6, 7])
def test_a_non_finite_loss_stops_with_step_records_and_last_good_checkpoint(tmp_path, poison):
    with (
        Checkpointer(tmp_path, every=3) as saver,
        pytest.raises(NonFiniteLossError) as caught,
    ):
        fit(
            least_squares_step(),
            initial_state(),
            Batches(poison=poison),
            num_steps=STEPS,
            checkpointer=saver,
        )
    # Step 6 is due for a checkpoint and is the poisoned one at first; then it is the last good one.
    good = {6: 3, 7: 6}[poison]
    rows = {6: "epoch 1, rows 8-11: pairs.jsonl:", 7: "epoch 2, rows 0-3: pairs.jsonl:"}[poison]
    assert f"loss is nan at step {poison} ({rows}" in str(caught.value)
    assert f"the last good checkpoint is step {good} in {tmp_path}:" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["3"] if good == 3 else ["3", "6"])


def test_a_non_finite_gradient_stops_too_and_says_when_nothing_is_saved():
    def step(state, batch):
        return state, {"loss": jnp.float32(1), "grad_norm": jnp.float32(jnp.inf)}

    with pytest.raises(NonFiniteLossError, match=r"grad_norm is inf at step 1 .*no checkpoint was"):
        fit(step, initial_state(), Batches(), num_steps=STEPS)


class Metric:
    """A scalar that notes when the host asks for it."""

    def __init__(self, events, number):
        self.events, self.number = events, number

    def __float__(self):
        self.events.append(f"fetch {self.number}")
        return 1.0


def run_with_events(saver=None):
    events = []
    batches = Batches()

    def step(state, batch):
        events.append(f"step {int(state.step) + 1}")
        return dataclasses.replace(state, step=state.step + 1), {
            "loss": Metric(events, int(state.step) + 1)
        }

    def attach(batch):
        events.append(f"attach {batches.taken}")
        return batch

    def place(batch):
        events.append(f"place {batches.taken}")
        return batch

    fit(
        step,
        initial_state(),
        batches,
        num_steps=3,
        attach=attach,
        place=place,
        checkpointer=saver,
    )
    assert batches.taken == 3
    return events


def test_the_host_prepares_the_next_batch_and_fetches_the_last_step_while_one_runs():
    assert run_with_events() == [
        *["attach 1", "place 1"],
        *["step 1", "attach 2", "place 2"],
        *["step 2", "attach 3", "place 3", "fetch 1"],
        *["step 3", "fetch 2"],
        "fetch 3",
    ]


def test_a_checkpoint_waits_for_the_loss_and_holds_the_position_of_the_next_batch():
    class Saver:
        """Notes what is saved at step 1 and after."""

        best_metric = None

        def __init__(self):
            self.saved = []

        def due(self, step):
            return step == 1

        def save(self, step, state, data, metrics=None):
            self.saved.append((step, int(state.step), data))

        def wait(self):
            self.saved.append("wait")

    saver = Saver()
    events = run_with_events(saver)
    assert events.index("fetch 1") < events.index("step 2")
    assert saver.saved == [
        (1, 1, {"epoch": 0, "row": 4}),
        (3, 3, {"epoch": 1, "row": 0}),
        "wait",
    ]


class Notes:
    """A writer that remembers."""

    def __init__(self):
        self.lines = []

    def write(self, step, metrics):
        self.lines.append((step, dict(metrics)))

    def close(self):
        pass


def test_speed_is_tokens_over_training_time_without_compilation_and_evaluation(monkeypatch):
    now = 0.0
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now)

    class Loss:
        """Takes a while: 9 seconds for step 1, which is compiled, and 2 for the others."""

        def __init__(self, number):
            self.number = number

        def __float__(self):
            nonlocal now
            now += 9.0 if self.number == 1 else 2.0
            return 0.5

    def step(state, batch):
        state = dataclasses.replace(state, step=state.step + 1)
        return state, {"loss": Loss(int(state.step)), "num_tokens": 100}

    def evaluate(state):
        nonlocal now
        now += 60.0
        return {"eval/reward": 1.0}

    notes = Notes()
    options = {"log_every": 2, "evaluate": evaluate, "evaluate_every": 3}
    fit(step, initial_state(), Batches(), num_steps=6, writer=notes, **options)
    speeds = {n: m.get("tokens_per_second") for n, m in notes.lines if "loss" in m}
    assert speeds == {2: 50.0, 4: 50.0, 6: 50.0}


def test_evaluations_are_written_after_their_step_and_decide_what_is_kept(tmp_path):
    notes = Notes()
    rewards = {2: 0.1, 4: 0.9, 6: 0.3, 7: 0.2}
    with Checkpointer(tmp_path, every=100, keep=1, best_metric="eval/reward") as saver:
        fit(
            least_squares_step(),
            initial_state(),
            Batches(),
            num_steps=7,
            writer=notes,
            checkpointer=saver,
            evaluate=lambda state: {"eval/reward": rewards[int(state.step)]},
            evaluate_every=2,
        )
        assert (saver.steps(), saver.best_step()) == ([4, 7], 4)
    assert [step for step, _ in notes.lines] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 7]
    assert [(s, m) for s, m in notes.lines if "loss" not in m] == [
        (step, {"eval/reward": reward}) for step, reward in rewards.items()
    ]


def test_keeping_the_best_of_what_nobody_measures_is_refused(tmp_path):
    with (
        Checkpointer(tmp_path, every=1, best_metric="eval/reward") as saver,
        pytest.raises(ValueError, match=r"best by 'eval/reward', which nobody measures"),
    ):
        fit(least_squares_step(), initial_state(), Batches(), num_steps=1, checkpointer=saver)


def test_the_end_of_the_batches_is_an_error_not_the_end_of_training():
    class Few(Batches):
        """Two batches."""

        def __next__(self):
            if self.taken == 2:
                raise StopIteration
            return super().__next__()

    with pytest.raises(ValueError, match=r"came to an end before step 3: .* num_steps=2"):
        fit(least_squares_step(), initial_state(), Few(), num_steps=3)


def test_a_finished_run_is_left_alone():
    state = dataclasses.replace(initial_state(), step=jnp.int32(STEPS))
    batches = Batches()
    assert fit(least_squares_step(), state, batches, num_steps=STEPS) is state
    assert batches.taken == 0


if __name__ == "__main__":
    train(sys.argv[1], every=int(sys.argv[2]), on_step=kill_myself)


# --- a part of a longer run ---


def part(workdir, first, last, *, every=3, kill_at=None, **kwargs):
    """Steps `first + 1` to `last` as a part; the saver's steps and the writer's lines."""
    batches = Batches()
    with Checkpointer(pathlib.Path(workdir) / "checkpoints", every=every) as saver:
        state = initial_state()
        for _ in range(first):
            state, _ = take_step(state, next(batches))
        writer = JsonlWriter(pathlib.Path(workdir) / "metrics.jsonl")

        def on_step(number, _metrics):
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            fit(
                least_squares_step(),
                state,
                batches,
                num_steps=last,
                writer=writer,
                checkpointer=saver,
                on_step=on_step,
                whole=False,
                **kwargs,
            )
        finally:
            writer.close()
            saver.wait()
            saved = {step: saver.restore(step, initial_state())[1] for step in saver.steps()}
    return saved, [line["step"] for line in lines_without_times(workdir)]


def test_the_last_step_of_a_part_is_nothing_special(tmp_path):
    def measure(state):
        return {"score": float(state.step)}

    # Checkpoints fall on 3 and 6, of which the part's last step is left to the caller.
    saved, steps = part(tmp_path, 2, 6, log_every=4, evaluate=measure, evaluate_every=5)
    assert list(saved) == [3]
    assert steps == [4, 5]  # a metrics line and an evaluation; none for the last step
    saved, steps = part(tmp_path / "silent", 0, 2, log_every=0, evaluate=measure)
    assert (saved, steps) == ({}, [])


@pytest.mark.parametrize("kill_at", [4, 5])
def test_a_signal_stops_a_part_after_its_last_step_too(tmp_path, kill_at):
    """Step 5 is the last; a signal that comes while it runs is not lost."""
    with pytest.raises(SystemExit) as ended:
        part(tmp_path, 0, 5, every=100, kill_at=kill_at)
    assert ended.value.code == 143
    with Checkpointer(tmp_path / "checkpoints", every=1) as saver:
        assert saver.steps() == [5]
        _, position = saver.restore(5, initial_state())
    assert position == {"epoch": 1, "row": 8}
