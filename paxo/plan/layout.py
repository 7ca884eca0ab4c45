"""What the settings ask for: a model, lengths of its data, and how a run lies on devices."""

import dataclasses
import math
from typing import Any, NamedTuple

from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from paxo.experiment import MeshSettings
from paxo.models.config import ModelConfig
from paxo.models.known import known_config
from paxo.models.pretrained import read_config, resolve_model
from paxo.models.sharding import MESH_AXES
from paxo.overrides import SettingsError


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a search may change without changing what is learnt from how many tokens.

    Attributes:
        data: copies of the parameters.
        fsdp: ways in which they are split along their width.
        tensor: ways in which heads, the SwiGLU and the vocabulary are split.
        rows: R, rows a step over all devices.
        row_length: L, tokens of a row.
        microbatches: parts in which a step's rows are run.
        remat: what the backward pass computes again.
    """

    data: int
    fsdp: int
    tensor: int
    rows: int
    row_length: int
    microbatches: int
    remat: str

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Mesh axis -> devices."""
        return dict(zip(MESH_AXES, (self.data, self.fsdp, self.tensor)))

    @property
    def rows_per_device(self) -> int:
        """Rows of one microbatch that lie on a device."""
        return self.rows // (self.data * self.fsdp * self.microbatches)

    def flags(self, *, rows: str | None, microbatches: str, row_length: str) -> str:
        """The settings that choose it, as `--set` takes them.

        Args:
            rows: what the settings call the number of rows; None where it follows from the others.
            microbatches: what they call the parts of a step.
            row_length: what they call the length of a row.
        """
        return " ".join([
            f"mesh.data={self.data} mesh.fsdp={self.fsdp} mesh.tensor={self.tensor}",
            *([] if rows is None else [f"{rows}={self.rows}"]),
            f"{microbatches}={self.microbatches} {row_length}={self.row_length}",
            f"model.remat={self.remat}",
        ])  # fmt: skip


class Lengths(NamedTuple):
    """Mean tokens of a prompt and of a completion, and the longest of each."""

    prompt: float
    completion: float
    max_prompt: int
    max_completion: int


def model_config(settings: Any, model: str | None) -> ModelConfig:
    """The shape of the model: the named one's, or that of the settings.

    Args:
        settings: an `Experiment` or a `SelfPlay`.
        model: name of a known shape; None takes that of `settings.model`.

    Raises:
        SettingsError: for an unknown name, or where the settings name none.
    """
    chosen = settings.model
    names = ("param_dtype", "compute_dtype", "remat", "unroll", "attention")
    changes = {name: getattr(chosen, name) for name in names}
    if model is not None:
        try:
            config = known_config(model)
        except ValueError as error:
            raise SettingsError(f"--model: {error}") from error
    elif chosen.path is not None:
        config = read_config(resolve_model(chosen.path))
    elif chosen.config is not None:
        config = chosen.config
    else:
        raise SettingsError("model.path is not set: name a model, or its shape with --model")
    return dataclasses.replace(config, **changes)


def frozen_layout(mesh: MeshSettings | None, role: str, layout: Layout) -> Layout:
    """How a frozen policy lies beside a run that lies as `layout`: on its own mesh, if it has one.

    Raises:
        SettingsError: if its mesh does not fit the devices, or does not divide the rows.
    """
    if mesh is None:
        return layout
    devices = math.prod(layout.mesh_shape.values())
    found = dataclasses.replace(layout, **mesh_sizes(mesh, devices, f"{role}.mesh"))
    if layout.rows % (found.data * found.fsdp):
        raise SettingsError(
            f"{role}.mesh {found.mesh_shape} splits rows in {found.data * found.fsdp} ways, which "
            f"do not divide the {layout.rows} rows of a batch: choose other sizes of data and fsdp"
        )
    return found


def mesh_sizes(mesh: MeshSettings, devices: int, name: str) -> dict[str, int]:
    """Axis -> devices, as the settings under that name ask for."""
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise SettingsError(f"{name} sizes are at least 1, and one may be -1; got {sizes}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = max(devices // known, 1)
    if math.prod(sizes.values()) != devices:
        raise SettingsError(
            f"{name} {sizes} is of {math.prod(sizes.values())} devices, the topology of {devices}: "
            "set one axis to -1 to take what is left, as in "
            f"--set {name}.fsdp=-1 {name}.data=1"
        )
    return sizes


def abstract_mesh(layout: Layout, platform: str) -> AbstractMesh:
    """A layout's mesh without devices, under which programs are traced as for that platform."""
    return AbstractMesh(
        tuple(layout.mesh_shape.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        abstract_device=AbstractDevice(device_kind=platform, num_cores=None, platform=platform),
    )
