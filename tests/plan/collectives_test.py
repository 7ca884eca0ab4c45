"""What devices send one another, read from programs whose traffic is known by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from paxo.models.sharding import make_mesh
from paxo.overrides import apply_overrides
from paxo.plan.collectives import collective_bytes, collectives
from paxo.plan.compiled import lower_step
from paxo.plan.network import traffic_of
from paxo.plan.topology import parse_topology
from tests.plan.planned import made_run, made_settings

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def program(*lines, name="main"):
    return "\n".join([f"ENTRY {name} (x: f32[4]) -> f32[8] {{", *(f"  {x}" for x in lines), "}"])


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("{{0,2},{1,3},{4,6},{5,7}}", "fsdp"),
        ("[4,2]<=[8]", "tensor"),
        ("[4,2]<=[4,2]T(1,0)", "fsdp"),
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("[4,2]<=[2,2,2]T(0,2,1)", "fsdp"),
        ("[2,4]<=[8]", "fsdp+tensor"),
        ("[2,4]<=[4,2]T(1,0)", "data+fsdp"),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", "data+fsdp"),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}", "fsdp"),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}", "fsdp"),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}", "tensor"),
        ("{}", "data+fsdp+tensor"),
    ],
)
def test_groups_of_partitions_tell_the_axis(groups, axes):
    line = f"%y = f32[8]{{0}} all-gather(%x), replica_groups={groups}, dimensions={{0}}"
    assert list(collective_bytes(program(line), MESH)) == [axes]


@pytest.mark.parametrize(
    ("instruction", "nbytes"),
    [
        ("bf16[8,4]{1,0} all-gather(%x)", 8 * 4 * 2 / 2),
        ("(bf16[4,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x)", 8 * 4 * 2 / 2),
        ("f32[8]{0} all-reduce(%x)", 8 * 4),
        ("(f32[8]{0}, pred[8]{0}) all-reduce(%x, %z)", 8 * 4 + 8),
        ("f32[8]{0} all-reduce-start(%x)", 8 * 4),
        ("f32[8]{0} all-reduce-done(%x)", None),
        ("f32[4]{0} reduce-scatter(%x)", 8 * 4 / 2),
        ("f32[8]{0} all-to-all(%x)", 8 * 4 / 2),
        ("(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x)", 8 * 4),
    ],
)
def test_each_collective_brings_what_a_ring_does(instruction, nbytes):
    key = "source_target_pairs" if "permute" in instruction else "replica_groups"
    line = f"%y = {instruction}, {key}={{{{0,1}},{{2,3}},{{4,5}},{{6,7}}}}"
    assert collective_bytes(program(line), MESH) == ({} if nbytes is None else {"tensor": nbytes})


def test_a_reduction_of_which_a_device_keeps_its_part_and_one_in_several_fusions():
    groups = "replica_groups={{0,2},{1,3},{4,6},{5,7}}, channel_id=7"
    text = "\n".join([
        "%all-reduce-scatter.1 (p: f32[8]) -> f32[4] {",
        f"  %r = f32[8]{{0}} all-reduce(%p), {groups}",
        "}",
        "%async_collective_fusion.1 (p: f32[4]) -> f32[8] {",
        f"  %g = f32[8]{{0}} all-gather(%p), {groups}",
        "}",
        "%async_collective_fusion.2 (p: f32[4]) -> f32[8] {",
        f"  %g = f32[8]{{0}} all-gather(%p), {groups}",
        "}",
        program(
            "%a = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1",
            "%b = f32[8]{0} fusion(%a), kind=kCustom, calls=%async_collective_fusion.1",
            "%c = f32[8]{0} fusion(%b), kind=kCustom, calls=%async_collective_fusion.2",
        ),
    ])  # fmt: skip
    assert {x.operation for x in collectives(text, 8)} == {"reduce-scatter", "all-gather"}
    assert collective_bytes(text, MESH) == {"fsdp": 16.0 + 16.0}


def test_a_loop_counts_as_often_as_it_turns():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = make_mesh(2, 2, 2)
    placed = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    weights = jax.ShapeDtypeStruct((5, 16, 32), jnp.float32, sharding=placed(None, "fsdp"))
    states = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=placed("data"))

    @functools.partial(jax.jit, out_shardings=placed("data"))
    def layers(states, weights):
        def layer(states, kernel):
            kernel = jax.lax.with_sharding_constraint(kernel, placed())
            return jnp.tanh(states @ kernel.T) @ kernel, None

        return jax.lax.scan(layer, states, weights)[0]

    text = layers.lower(states, weights).compile().as_text()
    # Half of a kernel [16, 32] comes from the other device, five times.
    assert collective_bytes(text, dict(mesh.shape)) == {"fsdp": 5 * 16 * 32 * 4 / 2}


def test_the_step_on_a_tpu_sends_what_was_estimated():
    pytest.importorskip("libtpu")
    settings = made_settings(
        mesh=(2, 2, 2), rows=8, remat="full", unroll=False, hidden_size=512, num_layers=12,
        intermediate_size=1024,
    )  # fmt: skip
    run = made_run(apply_overrides(settings, ["model.compute_dtype=bfloat16"]))
    topology = parse_topology("v5e:2x4")
    mesh = make_mesh(**run.layout.mesh_shape, devices=topology.devices())
    found = collective_bytes(lower_step(run, mesh).compile().as_text(), dict(mesh.shape))
    estimated = traffic_of(run).step
    for axis, within in (("data", 0.05), ("fsdp", 0.05), ("tensor", 0.25)):
        assert found[axis] == pytest.approx(estimated[axis], rel=within)
