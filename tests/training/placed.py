"""One step of a made run, on whatever devices: what tests of placement compare."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paxo.frozen import HEAD, frozen_shardings
from paxo.losses.contract import stateful, whole_batch
from paxo.losses.pairwise import log_ratios, margin
from paxo.models.sharding import param_shardings
from paxo.numerics import Mean, masked, valid_rows
from paxo.objectives import Objective, Term, objective, weighted_sum
from paxo.rows import everywhere, row_share
from paxo.scoring import attach_logps, make_scorer
from paxo.training.state import init_state, state_shardings
from paxo.training.step import compile_step, make_train_step, place_rows
from tests.made import made_batch, tiny_policy


@whole_batch
def centred_loss(policy_logps, reference_logps, *, where=None):
    """Couples groups: every margin is measured from the mean margin of the batch."""
    margins = margin(log_ratios(policy_logps, reference_logps, where))
    valid = valid_rows(where)
    center = Mean.over(margins, valid).value
    return masked(jax.nn.softplus(-(margins - 2 * center)), valid)


def _zero_shift(*, rate):
    return jnp.zeros(())


@stateful(_zero_shift)
def shifted_loss(policy_logps, reference_logps, *, rate=0.5, where=None, state=None):
    """Remembers a running mean of the log-ratios and subtracts it."""
    ratios = log_ratios(policy_logps, reference_logps, where)
    shift = (1 - rate) * state + rate * Mean.over(jax.lax.stop_gradient(ratios), where).value
    valid = valid_rows(where)
    loss = masked(
        jax.nn.softplus(-(ratios[..., 0] - shift)) + jax.nn.softplus(ratios[..., 1] - shift), valid
    )
    return loss, shift


def token_nll(policy_token_logps, token_mask, *, where=None):
    """Token-level arrays through the step."""
    return Mean(
        -jnp.sum(masked(policy_token_logps, token_mask)), jnp.sum(token_mask, dtype=jnp.float32)
    )


def token_divergence(token_kls, token_mask, *, where=None):
    """Whole next-token distributions through the step: of the reference its head is needed too."""
    return Mean(jnp.sum(masked(token_kls, token_mask)), jnp.sum(token_mask, dtype=jnp.float32))


# Every way to make a mesh of eight devices.
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(sizes) == 8]
# Of the published ones, each kind: pairs, a statistic of the whole batch, lists, three policies.
PUBLISHED = {
    "dpo": objective("dpo", beta=0.5),
    "kto": objective("kto", beta=0.5),
    "lipo_lambda": objective("lipo_lambda", beta=0.5),
    "inpo": objective("inpo", eta=0.5, tau=0.2),
}
OBJECTIVES = PUBLISHED | {
    "published": weighted_sum(*((goal, 1.0) for goal in PUBLISHED.values())),
    "dpo + nll": weighted_sum((objective("dpo"), 1.0), (objective("nll"), 0.2)),
    "whole_batch": Objective((Term("centred", centred_loss, {}),)),
    "stateful": Objective((Term("shifted", shifted_loss, {"rate": 0.5}),)),
    "token-level": Objective((Term("token_nll", token_nll, {}),)),
    "divergence": Objective((Term("token_divergence", token_divergence, {}),)),
}
RATE = 0.1


@functools.cache
def made_run(name, **changes):
    """Policy, optimiser, state and a batch of host arrays for an objective."""
    policy, params = tiny_policy(num_layers=1, **changes)
    groups = made_batch(24, rows=16, length=32, longest=5)
    if name == "kto":  # undesirable ones too
        signs = np.where(np.arange(16)[:, None, None] % 2, 1, -1)
        groups = groups.replace(labels=(groups.labels * signs).astype(np.float32))
    frozen = {}
    for seed, role in ((7, "reference"), (8, "previous")):
        _, other = tiny_policy(seed=seed, num_layers=1, **changes)
        if role in (*OBJECTIVES[name].roles, "reference"):
            hidden = OBJECTIVES[name].reads_hidden(role)
            groups = attach_logps(groups, role, make_scorer(policy, other), hidden=hidden)
            frozen |= {HEAD: policy.unembed(other)} if hidden else {}
    optimizer = optax.sgd(RATE)
    state = init_state(params, OBJECTIVES[name], optimizer, jax.random.key(3), frozen=frozen)
    return policy, optimizer, state, jax.tree.map(np.asarray, groups)


def compiled_on(mesh, name, microbatches=1, **changes):
    """The compiled step, and the state where it belongs."""
    policy, optimizer, state, _ = made_run(name, **changes)
    step = make_train_step(policy, OBJECTIVES[name], optimizer, microbatches=microbatches)
    placed = param_shardings(policy.logical_axes, state.params, mesh)
    own = frozen_shardings(state.frozen, mesh)
    shardings = state_shardings(state, placed, optimizer, own)
    return compile_step(step, mesh, shardings, donate=False), _put(state, shardings)


def _put(state, shardings):
    """`device_put` over several processes, which does not take random keys."""
    key = jax.jit(lambda: jax.random.key(3), out_shardings=shardings.key)()
    arrays, places = (x.replace(key=None) for x in (state, shardings))
    return jax.device_put(arrays, places).replace(key=key)


@functools.cache
def step_on(mesh, name, microbatches=1, **changes):
    """Gradients, memory and report of one step on a mesh, each process giving its own rows."""
    compiled, state = compiled_on(mesh, name, microbatches, **changes)
    batch = made_run(name, **changes)[3]
    share = row_share(mesh)
    own = jax.tree.map(lambda x: np.split(x, share.count)[share.index], batch)
    after, report = compiled(state, place_rows(own, mesh))
    return told(
        made_run(name, **changes)[2], *everywhere((after.params, after.objective_state)), report
    )


def told(before, params, memory, report):
    """What a step did: plain SGD moves by rate * gradient."""
    moved = jax.tree.map(lambda a, b: (np.asarray(a) - np.asarray(b)) / RATE, before.params, params)
    return moved, jax.device_get(memory), {k: float(v) for k, v in report.items()}


def assert_same_step(got, wanted):
    """Gradients to 1e-5 of the largest entry, memory and report to 1e-5."""
    (grads, memory, report), (wanted_grads, wanted_memory, wanted_report) = got, wanted
    largest = max(np.abs(g).max() for g in jax.tree.leaves(wanted_grads))
    assert largest > 1e-3
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        # Reading the gradient off the parameters has an error of eps * |parameter| / rate.
        np.testing.assert_allclose(a, b, atol=1e-5 * largest + 2e-6)
    for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(wanted_memory), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for name, value in wanted_report.items():
        np.testing.assert_allclose(report[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
