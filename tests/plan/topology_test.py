"""Names of topologies."""

import importlib.util
import math
import os

import pytest

from paxo.models.sharding import make_mesh
from paxo.overrides import SettingsError
from paxo.plan import topology
from paxo.plan.chips import TPUS
from paxo.plan.topology import parse_topology, slices


@pytest.mark.parametrize(
    ("text", "devices", "chips"),
    [
        ("v5e:16x16", 256, 256),
        ("v6e:1x1", 1, 1),
        ("v5p:4x4x4", 64, 64),
        ("v5p:12x16x20", 3840, 3840),
        ("tpu7x:4x4x4", 128, 64),
        ("gpu:h200x8", 8, 8),
        ("gpu:a100x32", 32, 32),
    ],
)
def test_a_topology_has_the_devices_of_its_name(text, devices, chips):
    found = parse_topology(text)
    assert (found.num_devices, found.num_chips) == (devices, chips)
    assert found.compiles == (not text.startswith("gpu"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5:4x4", "unknown kind 'v5'; did you mean 'v5"),
        ("h100", "unknown kind 'h100'"),
        ("v5e", "no such slice; v5e comes as 1x1"),
        ("v5e:4x4x4", "no such slice"),
        ("v5e:32x32", "no such slice"),
        ("v5e:fourxfour", "no such slice"),
        ("v5p:4x4", "no such slice; v5p comes as 2x2x1"),
        ("v5p:4x4x6", "all sides multiples of 4"),
        ("v5p:32x32x32", "no such slice"),
        ("v5p:0x4x4", "no such slice"),
        ("gpu:h200", "gpu:KINDxNUMBER"),
        ("gpu:h900x8", "kinds are a100"),
        ("gpu:h200x0", "gpu:KINDxNUMBER"),
        ("gpu:h200x12", "comes in whole nodes"),
        ("cpu:4", "unknown kind 'cpu'"),
    ],
)
def test_what_cannot_be_is_refused_in_words(text, words):
    with pytest.raises(SettingsError, match=words):
        parse_topology(text)


@pytest.mark.parametrize("kind", TPUS)
def test_slices_grow_and_have_as_many_sides_as_their_torus(kind):
    found = slices(kind)
    sizes = [each.num_devices for each in found]
    assert sizes == sorted({*sizes})
    assert all(len(each.sides) == TPUS[kind].dims for each in found)
    assert all(math.prod(each.sides) == each.num_chips for each in found)


def test_the_cpu_has_this_machines_devices_and_memory():
    import jax

    found = parse_topology("cpu")
    assert found.devices() == jax.local_devices(backend="cpu")
    assert 2**28 < found.chip.hbm_bytes < 2**44
    assert 1e8 < found.chip.peak_flops < 1e14


def test_without_libtpu_the_way_out_is_told(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'paxo\[plan\]'"):
        parse_topology("v5e:2x2").devices()


def test_nothing_is_compiled_for_a_gpu_that_is_not_here():
    with pytest.raises(SettingsError, match="nothing can be compiled for a GPU"):
        parse_topology("gpu:h200x8").devices()


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@needs_libtpu
@pytest.mark.parametrize("text", ["v5p:4x4x4", "v5p:2x4x4", "v6e:8x16", "tpu7x:4x4x4"])
def test_every_split_of_a_slice_is_a_mesh(text):
    found = parse_topology(text)
    devices = found.devices()
    powers = [2**n for n in range(found.num_devices.bit_length())]
    for tensor, fsdp in ((t, f) for t in powers[:4] for f in powers if t * f <= len(devices)):
        mesh = make_mesh(-1, fsdp, tensor, devices=devices)
        assert {*mesh.devices.flat} == {*devices}


@needs_libtpu
def test_libtpu_knows_every_usual_slice_and_leaves_no_variable_behind():
    before = dict(os.environ)
    for kind in TPUS:
        for each in slices(kind)[:9]:
            devices = each.devices()
            assert {device.platform for device in devices} == {"tpu"}
    added = {*os.environ} - {*before}
    assert added <= {"TPU_LIBRARY_PATH"}  # jax's own
