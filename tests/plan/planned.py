"""Small runs, and topologies without devices, that tests of plans share."""

import dataclasses

import paxo
from paxo.data.limits import TokenLimits
from paxo.experiment import DataSettings, Experiment, MeshSettings, ModelSettings, TrainSettings
from paxo.models.config import ModelConfig
from paxo.plan.chips import Chip
from paxo.plan.kinds import first_layout
from paxo.plan.layout import model_config
from paxo.plan.shapes import make_run
from paxo.plan.topology import Topology

CONFIG = ModelConfig(
    vocab_size=1024,
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=512,
    max_positions=256,
    tie_embeddings=False,
)


def made_settings(objective="dpo", *, mesh=(1, 1, 1), remat="none", rows=4, parts=1, **changes):
    """Settings of a small run, its limits 32 and 32 tokens, its rows of 128."""
    return Experiment(
        objective=paxo.objective(objective),
        optimizer=paxo.adamw(1e-3),
        model=ModelSettings(config=dataclasses.replace(CONFIG, **changes), remat=remat),
        data=DataSettings(row_length=128, limits=TokenLimits(max_prompt=32, max_completion=32)),
        train=TrainSettings(10, rows_per_batch=rows, microbatches=parts),
        mesh=MeshSettings(*mesh),
    )


def made_run(settings=None, devices=None):
    """The run of such settings on as many devices as its mesh has."""
    settings = made_settings() if settings is None else settings
    mesh = settings.mesh
    config = model_config(settings, None)
    devices = mesh.data * mesh.fsdp * mesh.tensor if devices is None else devices
    return make_run(settings, config, first_layout(settings, config, devices))


def made_topology(devices=1, *, hbm=2.0**34, platform="gpu"):
    """Devices of 1e12 operations, 1e11 bytes of memory and 1e10 of links a second."""
    chip = Chip("made", hbm, 1e12, 1e11, 1e10, node=devices, network_bytes_per_second=1e9)
    return Topology(f"made:{devices}", platform, chip, (), devices)
