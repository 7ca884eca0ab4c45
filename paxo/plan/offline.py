"""A run on a data set, an `Experiment`, as plans ask for it."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paxo.data.row_shape import RowShape
from paxo.experiment import Experiment, MeshSettings, ModelSettings
from paxo.models.config import ModelConfig
from paxo.models.policy import make_policy, param_shapes
from paxo.objectives import Objective
from paxo.overrides import SettingsError
from paxo.plan.layout import Layout, Lengths
from paxo.plan.rounds import Drawing, Round
from paxo.sampling import SamplingConfig
from paxo.types import Params, Policy, PreferenceBatch

ROLES = ("reference", "previous")


@dataclasses.dataclass(frozen=True, eq=False)
class Offline:
    """What plans ask of the settings of a run on a data set.

    Attributes:
        settings: of the experiment.
    """

    settings: Experiment

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self.settings.objective

    @property
    def model(self) -> ModelSettings:
        """What is trained."""
        return self.settings.model

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.settings.train.num_steps

    @property
    def microbatches(self) -> int:
        """Parts in which a step's rows are run."""
        return self.settings.train.microbatches

    @property
    def fixed_rows(self) -> bool:
        """Whether a row can have no other length."""
        return self.settings.data.slots is not None

    @property
    def candidates(self) -> int:
        """K: 1 for demonstrations and signs, else a pair; one more with a mismatched one."""
        demonstrations = {term.name for term in self.objective.terms} == {"nll"}
        return (1 if demonstrations or self.objective.unpaired else 2) + self.objective.mismatched

    def mesh_of(self, role: str) -> MeshSettings | None:
        """The mesh of a frozen policy, where it has one of its own."""
        return getattr(self.settings, role).mesh

    def anywhere(self, mesh: MeshSettings) -> Experiment:
        """The settings on another mesh, its frozen policies too, in one part."""
        settings = self.settings
        own = {role: dataclasses.replace(getattr(settings, role), mesh=None) for role in ROLES}
        train = dataclasses.replace(settings.train, microbatches=1)
        return dataclasses.replace(settings, mesh=mesh, train=train, **own)

    def flags(self, layout: Layout) -> str:
        """The settings that choose a layout."""
        return layout.flags(
            rows="train.rows_per_batch",
            microbatches="train.microbatches",
            row_length="data.row_length",
        )

    def lengths(self, config: ModelConfig) -> Lengths:
        """Lengths half of the limits on average; without limits a row is a third prompt."""
        limits, row = self.settings.data.limits, self.settings.data.row_length
        longest = min(limits.max_sequence or config.max_positions, config.max_positions)
        group = min(row or limits.max_group or 2048, 2048, longest * self.candidates)
        prompt = limits.max_prompt or max(group // 3, 1)
        completion = limits.max_completion or max((group - prompt) // self.candidates, 1)
        prompt, completion = min(prompt, longest - 1), min(completion, longest - 1)
        return Lengths(prompt / 2, completion / 2, prompt, completion)

    def row_length(self, lengths: Lengths) -> int:
        """L that the settings ask for."""
        longest = lengths.max_prompt + self.candidates * lengths.max_completion
        return self.settings.data.row_length or max(1024, math.ceil(longest / 128) * 128)

    def first_rows(self, lengths: Lengths, length: int, ways: int) -> int:
        """R that the settings ask for.

        Raises:
            SettingsError: if mesh and microbatches do not divide it.
        """
        train = self.settings.train
        if train.rows_per_batch % (ways * train.microbatches):
            raise SettingsError(
                f"train.rows_per_batch={train.rows_per_batch} must be a multiple of the {ways} "
                "ways in which the mesh splits rows times "
                f"train.microbatches={train.microbatches}; "
                f"--set train.rows_per_batch={ways * train.microbatches}, or a larger mesh.tensor"
            )
        return train.rows_per_batch

    def rows(self, tokens: int, lengths: Lengths, length: int, ways: int, parts: int) -> int | None:
        """R of rows of another length that have as many tokens; None where there is none."""
        rows, over = divmod(tokens, length)
        return None if over or rows % (ways * parts) else rows

    def row(self, lengths: Lengths, length: int) -> RowShape:
        """The sizes of a row."""
        scored = self.candidates * lengths.completion / _group(lengths, self.candidates) * length
        slots = self.settings.data.slots or math.ceil(1.1 * scored / 64) * 64
        return RowShape(
            length=length,
            slots=min(slots, length),
            groups=math.ceil((self.groups(lengths, length) + 1) / 4) * 4,
            candidates=self.candidates,
            max_completion=min(lengths.max_completion, length),
        )

    def groups(self, lengths: Lengths, length: int, rows: int | None = None) -> float:
        """Groups that a row holds on average."""
        return max(length / _group(lengths, self.candidates), 1.0)

    def references(
        self, config: ModelConfig, params: Params
    ) -> tuple[dict[str, Params], tuple[str, ...]]:
        """Role -> shapes, and the roles with weights of their own.

        Roles whose settings are the same share one policy and stand once.
        """
        settings, objective = self.settings, self.settings.objective
        given = {role: getattr(settings, role) for role in ROLES}
        roles = [
            role
            for role, chosen in given.items()
            if role in objective.frozen_roles
            or (role in objective.optional_roles and chosen.attach)
        ]
        first: dict[Any, str] = {}
        for role in roles:
            first.setdefault(given[role], role)
        full = settings.model.lora is None

        def shapes(role: str) -> Params:
            dtype = given[role].dtype or config.param_dtype
            return param_shapes(dataclasses.replace(config, param_dtype=dtype))

        def is_copy(role: str) -> bool:
            own = given[role].path, given[role].dtype, given[role].mesh
            return full or any(x is not None for x in own)

        return {role: shapes(role) for role in first.values()}, tuple(
            filter(is_copy, first.values())
        )

    def scorings(self, references: Mapping[str, Params]) -> int:
        """Passes of a scorer over a step's rows."""
        return len(references)

    def frozen_policy(self, policy: Policy, config: ModelConfig) -> Policy:
        """The model of the frozen policies: without adapters and heads."""
        return make_policy(config)

    def batch(
        self,
        config: ModelConfig,
        policy: Policy,
        params: Params,
        rows: int,
        row: RowShape,
        references: Mapping[str, Params],
    ) -> PreferenceBatch:
        """A step's batch with all that the objective reads."""
        objective = self.objective
        axes = {"K": row.candidates, "T": row.max_completion, "D": config.hidden_size}

        def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, *shape), dtype)

        ints = functools.partial(array, dtype=jnp.int32)
        per_token, per_slot = ints(row.length), ints(row.slots)
        groups = row.groups, row.candidates
        # Where the name tells no axes, the records do: a number for each completion is the usual.
        told = [extra.partition(":") for extra in self.settings.data.extras]
        extras = {
            name: array(row.groups, *(axes[axis] for axis in letters or "K"))
            for name, _, letters in told
        }
        roles = [r for r in ROLES if r in objective.frozen_roles or r in references]
        return PreferenceBatch(
            tokens=per_token,
            positions=per_token,
            group=per_token,
            branch=per_token,
            score_from=per_slot,
            score_token=per_slot,
            score_slot=per_slot,
            labels=array(*groups),
            where=array(*groups, dtype=bool),
            fixed_logps={role: array(*groups) for role in roles},
            fixed_token_logps={r: array(row.slots) for r in roles if objective.reads_tokens(r)},
            fixed_hidden={
                r: array(row.slots, config.hidden_size, dtype=jnp.dtype(config.compute_dtype))
                for r in roles
                if objective.reads_hidden(r)
            },
            extras=extras,
            max_completion=row.max_completion,
        )

    def round(
        self, config: ModelConfig, lengths: Lengths, layout: Layout, groups: float, processes: int
    ) -> Round:
        """One online round of as many prompts as a step's rows have groups."""
        ways = layout.data * layout.fsdp
        count = math.ceil(groups * layout.rows / ways) * ways
        drawn = SamplingConfig(lengths.max_completion, num_candidates=self.candidates)
        return Round(count, count, lengths.max_prompt, 1, (Drawing(drawn),))


def _group(lengths: Lengths, candidates: int) -> float:
    """Tokens of a group on average."""
    return lengths.prompt + candidates * lengths.completion
