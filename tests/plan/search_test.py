"""Times, traffic and the search over layouts."""

import dataclasses

import pytest

from paxo.experiment import MeshSettings, ReferenceSettings
from paxo.plan.estimate import SPARE, Seconds, estimate
from paxo.plan.layout import Layout, model_config
from paxo.plan.network import axis_bandwidths, traffic_of
from paxo.plan.search import (
    estimates,
    fastest_sampler,
    fitting,
    free_layout,
    layouts,
    smallest,
)
from paxo.plan.topology import parse_topology
from tests.plan.planned import CONFIG, made_run, made_settings, made_topology


def wide(**changes):
    """A run whose memory differs between layouts."""
    return made_run(made_settings(rows=32, num_layers=8, **changes), devices=8)


RUN = wide(mesh=(8, 1, 1))


def ranked(run, topology):
    """All estimates that fit, the fastest first."""
    return fitting(estimates(run, topology), topology)


def test_every_layout_trains_on_as_many_tokens_with_all_devices():
    found = list(layouts(RUN, made_topology(8)))
    assert found[0] == RUN.layout
    assert len(found) == len({*found}) > 50
    for layout in found:
        assert layout.rows * layout.row_length == RUN.tokens
        assert layout.data * layout.fsdp * layout.tensor == 8
        assert layout.rows % (layout.data * layout.fsdp * layout.microbatches) == 0
        assert layout.row_length >= 32 + 2 * 32  # the longest pair


def test_the_fastest_comes_first_and_all_have_memory_to_spare():
    topology = made_topology(8, hbm=3e7)
    found = ranked(RUN, topology)
    seconds = [e.step.ranked + e.references * e.scorer.ranked for e in found]
    assert seconds == sorted(seconds)
    assert all(e.memory.peak() <= (1 - SPARE) * topology.chip.hbm_bytes for e in found)
    assert 0 < len(found) < len(list(layouts(RUN, topology)))


def test_more_memory_only_adds_layouts_and_never_makes_the_best_slower():
    few, many = (
        {e.layout: e for e in ranked(RUN, made_topology(8, hbm=size))} for size in (3e7, 6e7)
    )
    assert few.keys() < many.keys()
    first = lambda found: next(iter(found.values())).step.ranked  # noqa: E731
    assert first(many) <= first(few)


def test_nothing_fits_no_memory():
    assert ranked(RUN, made_topology(8, hbm=1e5)) == []


def test_sampling_is_fastest_where_no_weights_are_gathered_for_every_token():
    topology = made_topology(8)
    found = estimates(RUN, topology)
    best = fastest_sampler(found, topology)
    assert best.layout.fsdp == 1
    assert all(best.sampler.bound <= e.sampler.bound for e in found)
    assert fastest_sampler(found, made_topology(8, hbm=1e5)) is None


def test_a_step_on_twice_the_devices_takes_at_least_half():
    one = estimate(made_run(made_settings(rows=8, mesh=(1, 4, 1))), made_topology(4))
    two = estimate(made_run(made_settings(rows=8, mesh=(1, 8, 1))), made_topology(8))
    assert two.step.compute == one.step.compute / 2
    assert one.memory.peak() > two.memory.peak()
    assert one.flops == two.flops


def test_the_bound_is_the_slowest_and_utilisation_follows_from_it():
    assert Seconds(1.0, 3.0, 2.0).bound == 3.0
    assert Seconds(1.0, 3.0, 2.0).limited_by == "memory"
    topology = made_topology(1)
    found = estimate(made_run(), topology)
    assert found.mfu(topology) == found.useful_flops / found.step.bound / 1e12
    assert 0 < found.mfu(topology) <= 1
    assert found.tokens_per_second == found.tokens / (found.step.bound + found.scorer.bound)
    assert found.round_seconds > found.scored_step


def test_traffic_of_each_axis_by_hand():
    run = made_run(made_settings("simpo", rows=8, mesh=(2, 4, 1)))
    layer = 128 * 32 * (4 + 2 * 2) + 128 * 4 * 32 + 3 * 128 * 512
    weights = 4 * (2 * layer + 128 * 1024)  # float32 here; the embedding is looked up, not gathered
    step = traffic_of(run).step
    # Gathered forward and backward; gradients to those that hold them.
    assert step["fsdp"] == 3 / 4 * weights * 3
    parameters = sum(x.size for x in _leaves(run.params))
    assert step["data"] == 2 * 1 / 2 * 4 * parameters / 4
    assert step["tensor"] == 0
    split = traffic_of(made_run(made_settings("simpo", rows=8, mesh=(1, 1, 2)))).step
    assert split["fsdp"] == split["data"] == 0
    tokens = 8 * 128
    assert split["tensor"] == 2 * (2 * 1 / 2) * (2 * 2 * tokens * 128 * 4)


def test_a_reference_on_a_mesh_of_its_own_is_scored_over_its_axes():
    settings = made_settings(rows=8, mesh=(8, 1, 1))
    mesh, place = MeshSettings(data=1, fsdp=8), parse_topology("v5e:2x4")
    own = dataclasses.replace(settings, reference=ReferenceSettings(mesh=mesh))
    alike, apart = (estimate(made_run(s), place) for s in (settings, own))
    assert alike.traffic.scorer["fsdp"] == 0
    layer = 128 * 32 * (4 + 2 * 2) + 128 * 4 * 32 + 3 * 128 * 512
    assert apart.traffic.scorer["fsdp"] == 7 / 8 * 4 * (2 * layer + 128 * 1024)
    # Over both sides of the slice.
    links = 2 * place.chip.link_bytes_per_second
    assert apart.scorer.network == apart.traffic.scorer["fsdp"] / links
    assert (apart.step, apart.sampler) == (alike.step, alike.sampler)
    # Longer rows are fewer: numbers of them that its mesh does not split are left out.
    eight = dataclasses.replace(own, reference=ReferenceSettings(mesh=MeshSettings(data=8)))
    run, topology = made_run(eight), made_topology(8)
    assert {layout.rows for layout in layouts(run, topology)} == {8}
    assert {layout.rows for layout in layouts(made_run(settings), topology)} == {4, 8}


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


@pytest.mark.parametrize(
    ("topology", "mesh", "links"),
    [
        ("v5e:16x16", (1, 256, 1), {"fsdp": 4}),  # both rings, both ways
        ("v5e:16x16", (16, 16, 1), {"fsdp": 2, "data": 2}),
        ("v5e:4x4", (1, 16, 1), {"fsdp": 2}),  # no rings
        ("v5e:8x16", (1, 128, 1), {"fsdp": 3}),  # one ring
        ("v5p:4x4x4", (1, 64, 1), {"fsdp": 6}),
        ("v5p:2x4x4", (1, 32, 1), {"fsdp": 3}),  # no whole cube has no rings
        ("v5p:4x4x4", (1, 16, 4), {"tensor": 2, "fsdp": 4}),
    ],
)
def test_an_axis_has_the_links_of_the_sides_it_lies_on(topology, mesh, links):
    place = parse_topology(topology)
    layout = Layout(*mesh, rows=256, row_length=128, microbatches=1, remat="none")
    found = axis_bandwidths(layout, place)
    assert {a: found[a] / place.chip.link_bytes_per_second for a in links} == links


def test_an_axis_that_leaves_a_node_has_the_network():
    layout = Layout(2, 4, 2, rows=256, row_length=128, microbatches=1, remat="none")
    place = parse_topology("gpu:h200x16")
    found = axis_bandwidths(layout, place)
    assert found == {"tensor": 450e9, "fsdp": 450e9, "data": 50e9}


def test_the_smallest_slices_come_first_and_those_that_are_too_small_not_at_all():
    settings = made_settings(rows=16, remat="full")
    config = dataclasses.replace(CONFIG, num_layers=8000, hidden_size=256)
    found = smallest(settings, config, "v5e")
    topology, layouts = next(found)
    held = 12 * 8000 * (256 * 32 * 12 + 3 * 256 * 512)  # float32 weights and moments of the layers
    for devices, holds in ((topology.num_devices, True), (topology.num_devices // 2, False)):
        assert (devices * 0.9 * 15.75 * 2**30 > 1.4 * held) == holds
    assert 1 <= len(layouts) <= 2
    assert next(found)[0].num_devices > topology.num_devices


def test_a_search_may_start_from_any_mesh():
    settings = made_settings(rows=4)
    config = model_config(settings, None)
    layout = free_layout(settings, config, 8)
    assert (layout.data * layout.fsdp * layout.tensor, layout.rows) == (8, 4)
    assert free_layout(settings, config, 4096) is None
