"""Two processes of four devices each find what one device finds."""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from paxo.models.sharding import make_mesh
from tests import several_processes
from tests.compiling import quick_compiles  # noqa: F401
from tests.made import tiny_policy
from tests.made_run import PROJECT, SAMPLES, make_model, metrics, paxo, results, write_experiment
from tests.training.placed import MESHES, PUBLISHED, assert_same_step, step_on

pytestmark = pytest.mark.usefixtures("quick_compiles")


# All objectives together where hosts have other rows each, one where they share them.
STEPS = ("published:2x2x2", "dpo:1x1x8")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_pair(command, folder, until=None, stop=lambda process: process.kill(), **variables):
    """Runs a command as two processes, `{port}` and `{process}` filled in.

    When there is a file `until`, each is given to `stop`, the second first. Returns exit code,
    stdout and stderr of each.
    """
    port = free_port()
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # Threads of XLA: with fewer than devices, one that waits for the other process may keep
        # from running what that process waits for.
        "NPROC": "16",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(PROJECT),
    }
    processes = []
    with contextlib.ExitStack() as stack:
        for i in range(2):
            own = {name: value.format(port=port, process=i) for name, value in variables.items()}
            arguments = [part.format(port=port, process=i) for part in (sys.executable, *command)]
            out, err = (
                stack.enter_context((folder / f"{i}.{n}").open("w")) for n in ("out", "err")
            )
            started = subprocess.Popen(
                arguments, env=environment | own, cwd=PROJECT, stdout=out, stderr=err
            )
            stack.callback(started.kill)
            processes.append(started)
        while until is not None and not until.exists():
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        if until is not None:
            for process in reversed(processes):
                stop(process)
        codes = [process.wait(500) for process in processes]
    return [
        (c, *((folder / f"{i}.{n}").read_text() for n in ("out", "err")))
        for i, c in enumerate(codes)
    ]


def found_by_pair(folder, *names):
    make_model(folder / "model")
    rows = (SAMPLES / "pairs.jsonl").read_text().splitlines()
    (folder / "data.jsonl").write_text("\n".join([*rows, "{", *rows, "[]"]) + "\n")
    worker = ["-m", "tests.several_processes", "127.0.0.1:{port}", "{process}", str(folder), *names]
    outputs = run_pair(worker, folder)
    assert [code for code, *_ in outputs] == [0, 0], "\n".join(error for *_, error in outputs)
    results = [pickle.loads((folder / f"{i}.pickle").read_bytes()) for i in range(2)]
    return results, outputs


@pytest.fixture(scope="module")
def pair(tmp_path_factory, quick_compiles):  # noqa: F811
    folder = tmp_path_factory.mktemp("pair")
    results, outputs = found_by_pair(folder, *STEPS)
    return folder, results, outputs


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize("name", STEPS)
def test_loss_and_gradient_are_those_of_one_device(pair, name):
    _, results, _ = pair
    for found in results:
        assert_same_step(found["steps"][name], step_on(one_device(), name.partition(":")[0]))


def test_processes_that_hold_the_same_rows_have_the_same_share(pair):
    _, results, _ = pair
    assert [found["shares"] for found in results] == [[(0, 2), (0, 1)], [(1, 2), (0, 1)]]


def test_each_process_gets_the_completions_of_its_own_prompts(pair):
    _, results, _ = pair
    whole = several_processes.sampled(one_device())
    for found, own in zip(results, several_processes.OWN_PROMPTS):
        ours = found["completions"]
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(ours))
        np.testing.assert_array_equal(ours.tokens, whole.tokens[own])
        np.testing.assert_array_equal(ours.finish, whole.finish[own])
        np.testing.assert_allclose(ours.logps, whole.logps[own], atol=1e-5)


def test_what_each_process_has_is_put_together_on_all(pair):
    _, results, _ = pair
    for found in results:
        np.testing.assert_array_equal(found["together"], [0, 10, 11, 12, 13])


def test_held_out_figures_are_those_of_one_device_on_both(pair):
    _, results, _ = pair
    accuracy, nll = several_processes.measured(one_device())
    assert accuracy.count == 21
    for ours, ours_nll in (found["figures"] for found in results):
        assert ours == accuracy
        assert ours_nll.count == nll.count == 42
        assert ours_nll.value == pytest.approx(nll.value, rel=1e-6)


def test_a_checkpoint_of_both_is_read_on_another_mesh(pair):
    folder, results, _ = pair
    _, params = tiny_policy()
    for found in results:
        jax.tree.map(np.testing.assert_array_equal, found["restored"], params)
    assert [path.name for path in (folder / "ckpt").iterdir()] == ["1"]


def test_only_process_0_writes_prints_and_logs(pair):
    folder, _, ((_, printed, _), (_, *others)) = pair
    assert (folder / "run" / "log.txt").read_text().count("from process") == 1
    assert "from process 0" in (folder / "run" / "log.txt").read_text()
    assert len((folder / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert "printed by process 0" in printed
    assert "printed" not in others[0]
    # Errors are the exception.
    assert "from process 1" in others[1]


def test_each_process_tokenises_a_range_of_its_own_and_has_all(pair):
    folder, results, _ = pair
    whole, (counts, skipped, (alone,)) = several_processes.data_of(folder)
    read = [found["data"][1][2][0] for found in results]
    assert sum(read) == alone
    assert max(read) <= alone / 2 + 1
    for groups, told in (found["data"] for found in results):
        assert told[:2] == (counts, skipped)
        jax.tree.map(np.testing.assert_array_equal, groups, whole)


def test_an_error_in_the_data_of_one_process_is_that_of_all(pair):
    _, results, _ = pair
    wanted = "RecordError: a:3: field 'x': expected y, got z; -"
    assert [found["last failure"] for found in results] == [wanted] * 2


def test_a_failure_of_process_0_is_that_of_all(pair):
    _, results, _ = pair
    first, second = (found["failure"] for found in results)
    assert first.startswith("FileNotFoundError")
    assert second == "ValueError: process 0 could not begin; its own message tells why"


@pytest.mark.slow
def test_loss_and_gradient_of_each_objective_are_those_of_one_device(tmp_path):
    # Hosts with other rows each, and hosts that share a row; all together on every mesh.
    names = [f"{name}:{sizes}" for name in PUBLISHED for sizes in ("2x2x2", "1x1x8")]
    names += ["published:" + "x".join(map(str, sizes)) for sizes in MESHES]
    for found in found_by_pair(tmp_path, *names)[0]:
        for name in names:
            wanted = step_on(one_device(), name.partition(":")[0])
            assert_same_step(found["steps"][name], wanted)


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one_and_goes_on_after_a_kill(tmp_path):
    make_model(tmp_path / "model")
    file = write_experiment(tmp_path / "small.py", tmp_path / "model")
    settings = ["--set", "mesh.fsdp=2", "mesh.tensor=2"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert paxo("run", file, "--workdir", alone, *settings) == 0
    told = {
        "PAXO_COORDINATOR": "127.0.0.1:{port}",
        "PAXO_NUM_PROCESSES": "2",
        "PAXO_PROCESS_ID": "{process}",
    }
    command = ["-m", "paxo.cli", "run", str(file), "--workdir", str(both), *settings]
    stopped = run_pair(command, tmp_path, **told, until=both / "checkpoints" / "2")
    assert [code for code, *_ in stopped] == [-signal.SIGKILL] * 2
    (code, printed, logged), (other_code, other_printed, other_logged) = run_pair(
        command, tmp_path, **told
    )
    assert (code, other_code) == (0, 0), logged + other_logged
    assert "process 0 of 2, 8 cpu devices, 4 of them here" in logged
    assert "restored step" in logged
    assert "held-out reward accuracy" in printed
    assert "INFO" not in other_logged
    assert "held-out" not in other_printed
    assert [line["step"] for line in metrics(both)] == [line["step"] for line in metrics(alone)]
    for ours, theirs in zip(metrics(both), metrics(alone)):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    ours, theirs = results(both), results(alone)
    assert ours["heldout_accuracy"] == theirs["heldout_accuracy"]
    assert sorted(path.name for path in (both / "logps").iterdir()) == ["0.bin", "1.bin"]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    make_model(tmp_path / "model")
    file = write_experiment(tmp_path / "small.py", tmp_path / "model")
    run = tmp_path / "run"
    settings = ["train.num_steps=100000", "train.evaluate_every=0", "data.heldout=0"]
    told = ["--coordinator=127.0.0.1:{port}", "--num-processes=2", "--process-id={process}"]
    command = ["-m", "paxo.cli", "run", str(file), "--workdir", str(run), *told, "--set", *settings]
    sent = []

    def stop(process):
        if not sent:
            process.terminate()
        sent.append(process)

    outputs = run_pair(command, tmp_path, until=run / "checkpoints" / "2", stop=stop)
    assert [code for code, *_ in outputs] == [143, 143]
    last = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert f"stopped by SIGTERM after step {last}; a checkpoint is in" in outputs[0][2]
    assert metrics(run)[-1]["step"] == last


@pytest.mark.slow
def test_when_process_0_is_refused_the_other_ends_too(tmp_path):
    make_model(tmp_path / "model")
    file = write_experiment(tmp_path / "small.py", tmp_path / "model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    told = ["--coordinator=127.0.0.1:{port}", "--num-processes=2", "--process-id={process}"]
    command = ["-m", "paxo.cli", "run", str(file), "--workdir", str(tmp_path / "run"), *told]
    (code, _, error), (other_code, _, other_error) = run_pair(command, tmp_path)
    assert (code, other_code) == (2, 2)
    assert "holds a run with other settings" in error
    assert "process 0 could not begin" in other_error


@pytest.mark.slow
def test_self_play_of_two_processes_ends_as_that_of_one(tmp_path):
    experiment = str(PROJECT / "experiments" / "egpo_prompts.py")
    short = [
        *("sft_steps=2", "num_reviews=32", "num_prompts=24", "evaluation.num_prompts=8"),
        *("rounds.num_rounds=2", "rounds.prompts_per_round=8", "rounds.evaluate_every=1"),
        *("sampling.max_new_tokens=6", "sample_batch=8", "row_length=64", "checkpoint_every=1"),
        *("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
    ]
    alone = tmp_path / "alone"
    paxo("run", experiment, "--workdir", alone, "--set", *short)
    together = tmp_path / "together"
    command = [
        *("-m", "paxo.cli", "run", experiment, "--workdir", str(together)),
        *("--coordinator", "127.0.0.1:{port}", "--num-processes", "2", "--process-id", "{process}"),
        *("--set", *short),
    ]
    outputs = run_pair(command, tmp_path)
    assert [code for code, *_ in outputs] == [0, 0], "\n".join(error for *_, error in outputs)
    for name in ("0000-half", "0000"):  # before anything was trained, the same tokens
        first, second = ((x / "rounds" / f"{name}.jsonl").read_text() for x in (alone, together))
        assert first == second
    one, two = (results(folder)["last"] for folder in (alone, together))
    assert one["tokens"] == two["tokens"]
    assert one["kl_nats"] == pytest.approx(two["kl_nats"], abs=1e-3)


@pytest.mark.slow
def test_the_quickstart_of_two_processes_ends_as_that_of_one(tmp_path):
    experiment = str(PROJECT / "experiments" / "quickstart.py")
    short = [
        *("num_reviews=128", "num_prompts=64", "num_eval_prompts=40", "max_new_tokens=12"),
        *("sft_train.num_steps=10", "train.num_steps=4", "train.evaluate_every=2"),
        *("model.config.hidden_size=16", "model.config.num_layers=1", "model.unroll=false"),
        *("model.config.num_heads=2", "model.config.head_dim=8", "train.checkpoint_every=2"),
        *("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
    ]
    alone = tmp_path / "alone"
    assert paxo("run", experiment, "--workdir", alone, "--set", *short) == 0
    # Machines that share no disk but a bucket.
    for process in range(2):
        (tmp_path / f"{process}").mkdir()
        (tmp_path / f"{process}" / "bucket.txt").write_text(str(tmp_path / "bucket"))
    command = [
        *("-m", "paxo.cli", "run", experiment, "--workdir", f"{tmp_path}/{{process}}"),
        *("--coordinator", "127.0.0.1:{port}", "--num-processes", "2", "--process-id", "{process}"),
        *("--set", *short),
    ]
    outputs = run_pair(command, tmp_path)
    assert [code for code, *_ in outputs] == [0, 0], "\n".join(error for *_, error in outputs)
    one, two = results(alone), results(tmp_path / "0")
    assert flattened(two) == pytest.approx(flattened(one), abs=1e-5)
    # Rewards, lengths and wins follow from the tokens alone.
    for name in ("true_reward", "mean_length", "finished", "win_rate"):
        assert two[name] == one[name]
    for name in ("export", "model", "metrics.jsonl", "reward_kl.png", "results.json"):
        assert (tmp_path / "0" / name).exists()
        assert not (tmp_path / "1" / name).exists()
    assert "sequence KL to SFT" in outputs[0][1]
    assert "SFT" not in outputs[1][1]


def flattened(figures):
    """The numbers of nested dictionaries and lists."""
    return [float(x) for x in jax.tree.leaves(figures)]
