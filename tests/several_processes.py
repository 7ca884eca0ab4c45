"""What each of two processes does in the test of several: `python -m tests.several_processes`.

... COORDINATOR PROCESS FOLDER NAME...
"""

import faulthandler
import logging
import os
import pathlib
import pickle
import sys

import jax
import numpy as np

from paxo import distributed, loading, provenance
from paxo.data.batching import epoch_batches
from paxo.data.packing import choose_shape
from paxo.data.records import RecordError
from paxo.data.tokenise import load_tokenizer
from paxo.evaluation.heldout import nll_per_token, reward_accuracy
from paxo.experiment import DataSettings
from paxo.models.pretrained import read_config
from paxo.models.sharding import make_mesh, param_shardings
from paxo.rows import everywhere, from_all, place_rows, row_share
from paxo.sampling import SamplingConfig, make_sampler
from paxo.scoring import attach_logps, make_scorer
from paxo.training.checkpoint import Checkpointer
from paxo.training.writers import make_writer
from paxo.types import PromptBatch
from tests.made import made_groups, tiny_policy
from tests.made_run import TEMPLATE
from tests.training.placed import step_on

PROCESSES = 2
SECONDS = int(os.environ.get("SECONDS_AT_MOST", "450"))
SAMPLING = SamplingConfig(max_new_tokens=12, num_candidates=3)
STOP = (2,)
# Prompts of the first process and of the second.
OWN_PROMPTS = (slice(0, 5), slice(5, 6))


def prompts(own=slice(None)):
    """Some of six prompts, as wide as the longest of these."""
    rng = np.random.default_rng(0)
    lengths = np.array([3, 7, 5, 1, 6, 2], np.int32)
    tokens = rng.integers(3, 40, (6, 8)).astype(np.int32)
    tokens[np.arange(8) >= lengths[:, None]] = 0
    width = lengths[own].max()
    return PromptBatch(tokens[own, :width], lengths[own], np.arange(6, dtype=np.int32)[own])


def on(mesh, seed=0):
    """A policy and its parameters on a mesh."""
    policy, params = tiny_policy(seed=seed)
    return policy, jax.device_put(params, param_shardings(policy.logical_axes, params, mesh))


def sampled(mesh, own=slice(None)):
    """Completions of the own prompts."""
    policy, params = on(mesh)
    sampler = make_sampler(policy, SAMPLING, STOP, mesh=mesh)
    return sampler(params, prompts(own), jax.random.key(5))


def measured(mesh):
    """Held-out figures of 21 pairs, in 4 rows at a time."""
    policy, params = on(mesh)
    scorer = make_scorer(policy, params, mesh=mesh)
    reference = make_scorer(*on(mesh, seed=7), mesh=mesh)
    groups = made_groups(21)
    index, count = row_share(mesh)
    here = {"process_index": index, "process_count": count}
    rows = [
        place_rows(attach_logps(batch, "reference", reference), mesh)
        for batch, _ in epoch_batches(groups, choose_shape(groups, row_length=48), 4, **here)
    ]
    return reward_accuracy(scorer, rows), nll_per_token(scorer, rows)


def saved_and_restored(folder, mesh, other):
    """Parameters written from one mesh and read on another."""
    _, params = on(mesh)
    placed = param_shardings(tiny_policy()[0].logical_axes, params, other)
    with Checkpointer(folder, every=1) as checkpointer:
        checkpointer.save(1, {"params": params}, {"row": 3})
        checkpointer.wait()
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed
        )
        state, data, step = checkpointer.restore_latest({"params": wanted})
    assert (data, step) == ({"row": 3}, 1)
    return state["params"]


def step(name):
    """What a step does for an objective on a mesh."""
    objective, _, sizes = name.partition(":")
    return step_on(make_mesh(*map(int, sizes.split("x"))), objective)


def logged(folder):
    """Writes log and metrics of a run folder."""
    distributed.on_first(folder.mkdir)
    with provenance.log_to(folder):
        logging.getLogger("paxo").error("from process %d", jax.process_index())
    writer = make_writer(folder, 1)
    writer.write(1, {"loss": 1.0 + jax.process_index()})
    writer.close()
    print("printed by process", jax.process_index())


def data_of(folder):
    """Groups of a data set, and how many prompts this process encoded for them."""
    tokenizer = load_tokenizer(folder / "model", chat_template=TEMPLATE)
    config = read_config(folder / "model")
    counted, encode = [], tokenizer.encode
    object.__setattr__(
        tokenizer, "encode", lambda texts: counted.append(len(texts)) or encode(texts)
    )
    settings = DataSettings(path=str(folder / "data.jsonl"), on_error="skip")
    found = loading.read_data(settings, tokenizer, config)
    # Prompts are encoded in one call a block, then the texts of prompt and completion.
    return [(g.source, g.index, g.prompt, g.completions) for g in found.groups], (
        found.counts,
        found.skipped,
        counted[:1],
    )


def fails_on_last(folder):
    """What each process says of a record that only the last one reads."""
    try:
        loading.from_each(lambda: fail_at(jax.process_index()))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fail_at(process):
    if process == PROCESSES - 1:
        raise RecordError("a:3", "x", expected="y", got="z", way_out="-", reason="wrong type")


def fails_on_first(folder):
    """What each process says of a folder that process 0 cannot make."""
    try:
        distributed.on_first((folder / "no" / "such").mkdir)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(coordinator, process, folder, *names):
    """All of it; process 0 pickles what it finds, the other its completions."""
    # Where they wait for one another for ever, they end and say where that was.
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    process = int(process)
    distributed.start(coordinator, PROCESSES, process)
    folder = pathlib.Path(folder)
    mesh = make_mesh(2, 2, 2)
    found = {
        "shares": [tuple(row_share(make_mesh(*sizes))) for sizes in ((2, 2, 2), (1, 1, 8))],
        "completions": sampled(mesh, OWN_PROMPTS[process]),
        "figures": measured(mesh),
        "steps": {name: step(name) for name in names},
        "restored": everywhere(saved_and_restored(folder / "ckpt", mesh, make_mesh(1, 4, 2))),
        "together": from_all(np.arange(3 * process + 1) + 10 * process, mesh),
        "failure": fails_on_first(folder),
        "data": data_of(folder),
        "last failure": fails_on_last(folder),
    }
    logged(folder / "run")
    (folder / f"{process}.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
