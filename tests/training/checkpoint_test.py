"""Checkpoints: what is restored, what is kept, and what a kill or a full disk leaves behind."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paxo.training.checkpoint import Checkpointer

OPTIMIZER = optax.adamw(1e-2)


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


def make_state(width=8, optimizer=OPTIMIZER, seed=0):
    key = jax.random.key(seed)
    params = {
        "w": jax.random.normal(key, (width, 4)),
        "b": jnp.zeros((4,), jnp.bfloat16),
    }
    return State(params, {}, optimizer.init(params), (), jnp.int32(3), key)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def numbers(state):
    """The arrays of a state as NumPy copies, keys as their data."""
    return [
        np.array(jax.random.key_data(x))
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        else np.array(x)
        for x in jax.tree.leaves(state)
    ]


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(numbers(a), numbers(b)):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


def test_state_key_and_data_position_come_back_with_the_same_bits(tmp_path, caplog):
    state = make_state()
    data = {"seed": 0, "epoch": 1, "window": 2, "row": 3}
    with Checkpointer(tmp_path, every=1) as saver:
        saver.save(3, state, data)
    with Checkpointer(tmp_path, every=1) as saver, caplog.at_level("INFO", logger="paxo"):
        restored, found, step = saver.restore_latest(abstract(state))
    assert caplog.messages == [f"restored step 3 from {tmp_path}"]
    assert_same_bits(restored, state)
    assert (found, step) == (data, 3)
    assert jax.dtypes.issubdtype(restored.key.dtype, jax.dtypes.prng_key)
    assert float(jax.random.uniform(restored.key)) == float(jax.random.uniform(state.key))


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    with Checkpointer(tmp_path / "new", every=1) as saver:
        assert saver.restore_latest(abstract(make_state())) is None
        assert saver.best_step() is None


@pytest.mark.parametrize("devices", [1, 8])
def test_a_donating_step_right_after_a_save_does_not_reach_the_file(tmp_path, devices):
    if len(jax.devices()) < devices:
        pytest.skip("needs eight devices")
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    big = jax.device_put(jnp.zeros((1 << 20,)), split)
    pointer = big.addressable_shards[0].data.unsafe_buffer_pointer()
    big = add_one(big)
    # What makes this test one: without a save the step does write over its input.
    assert big.addressable_shards[0].data.unsafe_buffer_pointer() == pointer

    with Checkpointer(tmp_path, every=1, keep=9) as saver:
        for step in range(1, 6):
            saver.save(step, {"x": big}, {})  # holds `step` everywhere
            big = add_one(big)
            jax.block_until_ready(big)
        for step in range(1, 6):
            restored, _ = saver.restore(step, {"x": abstract(big)})
            np.testing.assert_array_equal(restored["x"], step)


def test_the_newest_and_the_best_are_kept(tmp_path):
    rewards = {1: 0.1, 2: 0.9, 3: 0.3, 4: None, 5: float("nan"), 6: 0.2}
    with Checkpointer(tmp_path, every=1, keep=2, best_metric="reward") as saver:
        for step, reward in rewards.items():
            metrics = None if reward is None else {"reward": reward}
            saver.save(step, {"x": jnp.full((2,), float(step))}, {}, metrics)
        saver.wait()
        assert saver.steps() == [2, 5, 6]
        assert saver.best_step() == 2
    with Checkpointer(tmp_path, every=1, keep=2, best_metric="reward") as saver:
        saver.save(7, {"x": jnp.zeros(2)}, {}, {"reward": 0.5})
        saver.wait()
        assert saver.steps() == [2, 6, 7]
        restored, _ = saver.restore(saver.best_step(), {"x": jnp.zeros(2)})
        np.testing.assert_array_equal(restored["x"], 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "6", "7"]


def test_best_may_mean_smallest(tmp_path):
    with Checkpointer(tmp_path, every=1, keep=1, best_metric="kl", best_mode="min") as saver:
        for step, kl in enumerate([3.0, 1.0, 2.0], start=1):
            saver.save(step, {"x": jnp.zeros(2)}, {}, {"kl": kl})
        saver.wait()
        assert (saver.steps(), saver.best_step()) == ([2, 3], 2)


def test_a_misspelt_best_metric_is_named_at_the_save(tmp_path):
    with (
        Checkpointer(tmp_path, every=1, best_metric="reward") as saver,
        pytest.raises(ValueError, match=r"'reward' is not among the metrics \['rewards'\]"),
    ):
        saver.save(1, {"x": jnp.zeros(2)}, {}, {"rewards": 1.0})


def test_another_model_is_refused_by_path_and_shapes(tmp_path):
    with Checkpointer(tmp_path, every=1) as saver:
        saver.save(3, make_state(width=8), {})
        saver.wait()
        with pytest.raises(ValueError) as caught:
            saver.restore_latest(abstract(make_state(width=16)))
    message = str(caught.value)
    assert "params/w is float32[8, 4] there and float32[16, 4] here" in message
    assert f"checkpoint {tmp_path}/3 " in message
    assert "(3 of 9 arrays differ)" in message  # the kernel and its two moments
    assert "\n" not in message


def test_another_optimiser_or_dtype_is_refused(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path, every=1) as saver:
        saver.save(3, state, {})
        saver.wait()
        with pytest.raises(ValueError, match=r"opt_state/0/count is int32.. there and absent here"):
            saver.restore_latest(abstract(make_state(optimizer=optax.sgd(1e-2))))
        half = dataclasses.replace(
            state, params={**state.params, "w": jnp.zeros((8, 4), "float16")}
        )
        with pytest.raises(
            ValueError, match=r"params/w is float32.8, 4. there and float16.8, 4. here"
        ):
            saver.restore_latest(abstract(half))


def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path):
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    state = make_state()
    with Checkpointer(tmp_path, every=1) as saver:
        saver.save(3, state, {})
        mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        same = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=split if x.shape == (8, 4) else same
            ),
            state,
        )
        restored, _, _ = saver.restore_latest(wanted)
    assert restored.params["w"].sharding == split
    assert restored.key.sharding == same
    assert_same_bits(restored, state)


def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path):
    state = {"x": jnp.arange(4.0)}
    with Checkpointer(tmp_path, every=1) as saver:
        saver.save(1, state, {})
    for path in (tmp_path / "1" / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"")
    with (
        Checkpointer(tmp_path, every=1) as saver,
        pytest.raises(ValueError, match=rf"{tmp_path}/1 cannot be read .*remove that folder"),
    ):
        saver.restore_latest(state)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written to .*file/checkpoints"):
        Checkpointer(tmp_path / "file" / "checkpoints", every=1)


def python(code, *args, timeout=120):
    """Start a Python process that runs the code."""
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


FULL_DISK = """
    import resource, signal, sys
    import jax, numpy as np
    from paxo.training.checkpoint import Checkpointer
    saver = Checkpointer(sys.argv[1], every=1, keep=1)
    state = {"x": jax.numpy.asarray(np.random.default_rng(0).standard_normal(100_000))}
    saver.save(1, state, {})
    saver.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # no file may grow beyond 50 kB from here on
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        saver.save(2, state, {})
        saver.wait()
    except OSError as error:
        print(error)
    print(saver.steps())
    saver.close()
"""


def test_a_full_disk_gives_one_line_and_leaves_nothing_half_written(tmp_path):
    out, err = python(FULL_DISK, tmp_path).communicate()
    assert out.splitlines() == [
        f"cannot write a checkpoint in {tmp_path} (File too large): make room there or choose "
        "another folder, and run the same command again; step 1 is kept",
        "[1]",
    ]
    assert "Traceback" not in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


SAVE_FOR_EVER = """
    import itertools, sys
    import jax, jax.numpy as jnp
    from paxo.training.checkpoint import Checkpointer
    saver = Checkpointer(sys.argv[1], every=1, best_metric="reward")
    for step in itertools.count(1):
        saver.save(step, {"x": jnp.full((50_000,), step)}, {"row": step}, {"reward": -step})
        print(step, flush=True)
"""


def test_killed_at_any_moment_the_last_finished_checkpoint_is_whole(tmp_path):
    wanted = {"x": jax.ShapeDtypeStruct((50_000,), jnp.int32)}
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = python(SAVE_FOR_EVER, folder)
        for _ in range(3 + attempt):
            process.stdout.readline()
        time.sleep(0.004 * attempt)  # so as not to be killed at the same place each time
        process.send_signal(signal.SIGKILL)
        started = 3 + attempt + len(process.stdout.read().split())
        process.wait()
        with Checkpointer(folder, every=1, best_metric="reward") as saver:
            state, data, step = saver.restore_latest(wanted)
            assert started - 2 <= step <= started + 1
            np.testing.assert_array_equal(state["x"], step)
            assert data == {"row": step}
            saver.save(step + 1, {"x": jnp.zeros((50_000,), jnp.int32)}, {}, {"reward": 0.0})
        assert not list(folder.glob("*tmp*"))


def test_half_deleted_and_half_written_checkpoints_are_passed_over_and_removed(tmp_path):
    with Checkpointer(tmp_path, every=1, keep=9, best_metric="r") as saver:
        for step in (1, 2, 3):
            saver.save(step, {"x": jnp.full((2,), step)}, {}, {"r": 1.0})
    for path in sorted((tmp_path / "1").rglob("*")):
        if path.is_file():
            path.unlink()
    for path in (tmp_path / "2").rglob("_CHECKPOINT_METADATA"):
        path.unlink()
    (tmp_path / "9.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpointer(tmp_path, every=1, keep=2, best_metric="r") as saver:
        _, _, step = saver.restore_latest({"x": jnp.zeros(2, jnp.int32)})
        assert step == 3
        saver.save(4, {"x": jnp.zeros(2, jnp.int32)}, {}, {"r": 2.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
