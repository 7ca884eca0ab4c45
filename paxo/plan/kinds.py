"""The kinds of settings that can be planned: one place that tells them apart.

Both answer the same questions, by attributes of the same names: `paxo.plan.offline` for runs on a
data set, `paxo.plan.self_play` for runs in rounds.
"""

from typing import Any

from paxo.experiment import Experiment
from paxo.models.config import ModelConfig
from paxo.overrides import SettingsError
from paxo.plan.layout import Layout, mesh_sizes
from paxo.plan.offline import Offline
from paxo.plan.self_play import Online
from paxo.rounds import SelfPlay

Kind = Offline | Online


def kind_of(settings: Any) -> Kind:
    """What plans ask of settings.

    Args:
        settings: an `Experiment` or a `SelfPlay`.

    Raises:
        SettingsError: for others, and for a self-play run that cannot be planned.
    """
    if isinstance(settings, Experiment):
        return Offline(settings)
    if isinstance(settings, SelfPlay):
        return Online(settings)
    raise SettingsError(
        "paxo plan reads a paxo.Experiment or a paxo.rounds.SelfPlay; this file's settings are "
        f"{type(settings).__name__}: plan a file with the same model and objective"
    )


def first_layout(settings: Any, config: ModelConfig, devices: int) -> Layout:
    """The layout that the settings ask for, on so many devices.

    Raises:
        SettingsError: if mesh, rows and microbatches do not fit one another.
    """
    kind = kind_of(settings)
    sizes = mesh_sizes(settings.mesh, devices, "mesh")
    lengths = kind.lengths(config)
    length = kind.row_length(lengths)
    return Layout(
        **sizes,
        rows=kind.first_rows(lengths, length, sizes["data"] * sizes["fsdp"]),
        row_length=length,
        microbatches=kind.microbatches,
        remat=config.remat,
    )
