"""All that changes during training, as one immutable value."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from paxo.objectives import Objective
from paxo.types import Array, Params, pytree


@pytree
class TrainState:
    """The state of a run between two steps.

    Attributes:
        params: trained parameters, those of `Policy.split`.
        frozen: parameters that take part but are not trained: the policy's own frozen ones (LoRA's
            base) under their names, a reference's head. Checkpoints leave them out.
        opt_state: of the optimiser.
        objective_state: memory of stateful losses, one entry a term.
        step: int32 number of finished steps.
        key: random key of the run; step n uses `fold_in(key, n)`.
    """

    params: Params
    frozen: Params
    opt_state: Any
    objective_state: Any
    step: Array
    key: Array

    def replace(self, **changes: Any) -> "TrainState":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def init_state(
    params: Params,
    objective: Objective,
    optimizer: Any,
    key: Array,
    *,
    frozen: Params | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
        params: parameters to be trained.
        objective: gives the first memory of stateful losses.
        optimizer: an Optax transformation, or settings such as `adamw(...)`.
        key: a typed random key.
        frozen: parameters that are not trained.
    """
    return TrainState(
        params=params,
        frozen={} if frozen is None else frozen,
        opt_state=as_transformation(optimizer).init(params),
        objective_state=objective.init_state(),
        step=jnp.zeros((), jnp.int32),
        key=key,
    )


def as_transformation(optimizer: Any) -> Any:
    """`optimizer` itself if it is an Optax transformation, else what its `build()` returns."""
    return optimizer.build() if hasattr(optimizer, "build") else optimizer


def snapshot(params: Params) -> Params:
    """A copy with buffers of its own: a step that donates its state deletes what it was given."""
    return jax.tree.map(jnp.copy, params)


def state_shardings(
    state: TrainState, param_shardings: Any, optimizer: Any, frozen_shardings: Any = None
) -> TrainState:
    """Where each array of a state lies on a mesh.

    Args:
        state: a state, or its shapes.
        param_shardings: `NamedSharding` of every trained parameter; moments lie as their parameter.
        optimizer: as for `init_state`.
        frozen_shardings: of frozen parameters; those that it leaves out lie on every device.
    """
    mesh = jax.tree.leaves(param_shardings)[0].mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        params=param_shardings,
        frozen=jax.tree.map(lambda _: everywhere, state.frozen) | (frozen_shardings or {}),
        opt_state=optax.tree_utils.tree_map_params(
            as_transformation(optimizer),
            lambda _, sharding: sharding,
            state.opt_state,
            param_shardings,
            transform_non_params=lambda _: everywhere,
        ),
        objective_state=jax.tree.map(lambda _: everywhere, state.objective_state),
        step=everywhere,
        key=everywhere,
    )
