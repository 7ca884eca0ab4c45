"""Frozen policies of a run: in which dtype and on which devices their parameters are kept."""

import dataclasses
import pathlib
import types

import jax
import numpy as np
import pytest

import paxo
from paxo import loading
from paxo.experiment import (
    DataSettings,
    Experiment,
    MeshSettings,
    ModelSettings,
    ReferenceSettings,
    TrainSettings,
)
from paxo.frozen import frozen_scorers
from paxo.models.sharding import make_mesh, param_shardings
from paxo.overrides import SettingsError
from paxo.rows import place_rows
from tests.compiling import quick_compiles  # noqa: F401
from tests.made import TINY, made_batch, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_compiles")
MESH = MeshSettings(2, 2, 2)


def run_of(rows=8, **reference):
    """Settings, model and mesh of a run on eight devices."""
    policy, params = tiny_policy()
    mesh = make_mesh(**dataclasses.asdict(MESH))
    params = jax.device_put(params, param_shardings(policy.logical_axes, params, mesh))
    tokenizer = types.SimpleNamespace(fingerprint=lambda: "words")
    model = loading.Model(policy, TINY, params, tokenizer=tokenizer, folder=pathlib.Path())
    settings = Experiment(
        objective=paxo.objective("dpo"),
        optimizer=paxo.adamw(1e-3),
        model=ModelSettings(config=TINY),
        data=DataSettings(),
        train=TrainSettings(1, rows_per_batch=rows),
        reference=ReferenceSettings(**reference),
        mesh=MESH,
    )
    return settings, model, mesh


def scorer_of(tmp_path, rows=8, **reference):
    """The scorer of the reference of a run on eight devices."""
    settings, model, mesh = run_of(rows, store="off", **reference)
    with frozen_scorers(settings, model, mesh, tmp_path) as scorers:
        return scorers["reference"], model.params, mesh


def test_a_reference_is_the_model_itself_where_nothing_is_asked(tmp_path):
    scorer, params, mesh = scorer_of(tmp_path)
    assert scorer.params is params
    assert scorer.mesh == mesh


def test_a_reference_in_bfloat16_on_a_mesh_of_its_own_scores_the_rows_of_the_run(tmp_path):
    exact, params, mesh = scorer_of(tmp_path)
    other = MeshSettings(data=1, fsdp=8)
    scorer, *_ = scorer_of(tmp_path, dtype="bfloat16", mesh=other)
    table = scorer.params["embed"]["embedding"]
    assert table.dtype == "bfloat16"
    assert table.nbytes == params["embed"]["embedding"].nbytes // 2
    assert table.sharding.shard_shape(table.shape) == (40, 16 // 8)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
    batch = made_batch()
    logps, wanted = (place_rows(s(batch), mesh) for s in (scorer, exact))
    assert logps.sharding == wanted.sharding
    np.testing.assert_allclose(logps, wanted, atol=0.3)
    assert np.abs(np.asarray(logps) - np.asarray(wanted)).max() > 0


def test_a_mesh_that_does_not_divide_the_rows_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="must divide the 4 rows of a batch"):
        scorer_of(tmp_path, mesh=MeshSettings(data=8), rows=4)


def test_a_run_that_was_interrupted_gives_its_store_back(tmp_path):
    given = *run_of(), tmp_path
    held = []  # as a notebook holds what an error's frames do

    def interrupted():
        with frozen_scorers(*given) as scorers:
            held.append(scorers["reference"])
            raise KeyboardInterrupt

    for _ in range(2):  # the second would be told that the first one still writes
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    assert len({scorer.store for scorer in held}) == 2
