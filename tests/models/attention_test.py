"""Attention of packed rows, dense and by blocks, against softmax over an explicit mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from paxo.models import attention
from paxo.models.attention import Sizes, packed_attention
from paxo.models.sharding import make_mesh

# One product of 8 x 8 tokens and 4 heads at a time is 256 scores: seven blocks go side by side.
DENSE, BLOCKS, ONE_BLOCK = Sizes(2**30, 8, 2**11), Sizes(0, 8, 7 * 256), Sizes(0, 16, 1)

TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def use(monkeypatch, sizes):
    monkeypatch.setattr(attention, "SIZES", {"cpu": sizes})


def made_labels(rows, length, *, seed=0, longest=9):
    """Groups with ragged branches, then padding; row 0 holds one group, row 1 none."""
    rng = np.random.default_rng(seed)
    group, branch = np.zeros((2, rows, length), np.int32)
    for row in range(2, rows):
        start, number = 0, 1
        while start < length - 5:
            for k, size in enumerate(rng.integers(1, longest, rng.integers(2, 5))):
                group[row, start : start + size], branch[row, start : start + size] = number, k
                start += size
            number += 1
        group[row, length - row :] = branch[row, length - row :] = 0
    group[0], branch[0] = 1, np.arange(length) * 3 // length
    return group, branch


def allowed(group, branch):
    """`[B, T, S]`, written out token by token as `PreferenceBatch` puts it."""
    rows, length = group.shape
    mask = np.zeros((rows, length, length), bool)
    for b, t in np.ndindex(rows, length):
        for s in range(t + 1):
            same = group[b, t] == group[b, s] != 0
            mask[b, t, s] = same and branch[b, s] in (0, branch[b, t])
    return mask


def by_definition(mask, q, k, v):
    """In float64 where that is enabled; rows of the mask without an entry give 0."""
    scores = jnp.einsum("btgqh,bsgh->bgqts", q, k) / np.sqrt(q.shape[-1])
    weights = jnp.where(mask[:, None, None], jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bgqts,bsgh->btgqh", weights / jnp.where(total > 0, total, 1), v)


def made_inputs(rows, length, kv_heads=2, per_key=2, width=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (rows, length, kv_heads)
    wide, narrow = (*heads, per_key, width), (*heads, width)
    q, k, v, weight = map(jax.random.normal, keys, (wide, narrow, narrow, wide))
    return (2 * q, k, v), weight


def value_and_gradient(function, inputs, weight):
    """The output, and the gradient of its sum with weights that padding has too."""

    def total(q, k, v):
        out = function(q, k, v)
        return jnp.sum(out * weight, dtype=jnp.float32), out

    run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (_, out), grads = run(*inputs)
    return out, *grads


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    ("sizes", "length", "kv_heads", "per_key"),
    [
        (DENSE, 50, 2, 2),
        (BLOCKS, 50, 4, 1),
        (BLOCKS, 50, 2, 2),
        (BLOCKS, 48, 1, 4),
        (ONE_BLOCK, 50, 2, 2),
        (ONE_BLOCK, 9, 2, 2),
    ],
    ids=["dense", "multi-head", "grouped", "whole blocks", "one at a time", "one block a row"],
)
def test_value_and_gradient_are_those_of_the_definition(
    sizes, length, kv_heads, per_key, monkeypatch
):
    use(monkeypatch, sizes)
    group, branch = made_labels(6, length)
    inputs, weight = made_inputs(6, length, kv_heads, per_key)
    found = value_and_gradient(lambda *x: packed_attention(*x, group, branch), inputs, weight)
    mask = allowed(group, branch)
    assert_close(found, value_and_gradient(functools.partial(by_definition, mask), inputs, weight))


@pytest.mark.parametrize("sizes", [DENSE, BLOCKS], ids=["dense", "blocks"])
def test_gradient_of_a_token_reaches_exactly_the_tokens_it_attends_to(sizes, monkeypatch):
    use(monkeypatch, sizes)
    group, branch = made_labels(3, 40)
    (q, k, v), _ = made_inputs(3, 40, 1, 1)
    mask = allowed(group, branch)

    @jax.jit
    def sources(row, token):
        out_of = lambda k, v: packed_attention(q, k, v, group, branch)[row, token].sum()  # noqa: E731
        return jax.grad(out_of, (0, 1))(k, v)

    for row, token in [(0, 39), (0, 20), (2, 0), (2, 17), (2, 30), (2, 37)]:
        to_keys, to_values = sources(row, token)
        expected = np.zeros(group.shape, bool)
        expected[row] = mask[row, token]
        np.testing.assert_array_equal(np.any(to_values != 0, (2, 3)), expected)
        assert not np.any(to_keys[~expected])


@pytest.mark.parametrize("sizes", [DENSE, BLOCKS], ids=["dense", "blocks"])
def test_padding_is_zero_and_takes_no_gradient(sizes, monkeypatch):
    use(monkeypatch, sizes)
    group, branch = made_labels(6, 40)
    inputs, weight = made_inputs(6, 40)
    found = value_and_gradient(lambda *x: packed_attention(*x, group, branch), inputs, weight)
    for x in found:
        assert not np.any(x[group == 0])
    # A lone token's weight is 1 whatever its query; its output and value always matter.
    for x in (found[0], found[3]):
        assert np.all(x[group != 0] != 0)


def test_scores_of_a_thousand_stay_finite(monkeypatch):
    use(monkeypatch, BLOCKS)
    group, branch = made_labels(4, 30)
    (q, k, v), weight = made_inputs(4, 30)
    inputs = (1e3 * q, k, v)
    found = value_and_gradient(lambda *x: packed_attention(*x, group, branch), inputs, weight)
    dense = functools.partial(attention._dense, group=group, branch=branch)
    assert_close(found, value_and_gradient(dense, inputs, weight), 1e-3)


def test_a_block_needs_the_keys_from_the_start_of_its_first_group(monkeypatch):
    use(monkeypatch, Sizes(0, 4, 2**10))
    group = np.array([[1] * 6 + [2] * 9 + [3] * 2 + [0] * 7, [1] * 24])
    needs, needed = attention._reach(group)
    # Blocks of the first row: 1111 1122 2222 2223 3000 0000.
    np.testing.assert_array_equal(needs, [1, 2, 2, 3, 2, 0, 1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(needed, [2, 3, 2, 2, 1, 0, 6, 5, 4, 3, 2, 1])


def test_blocks_hold_no_score_for_the_backward_pass(monkeypatch):
    use(monkeypatch, Sizes(0, 16, 2**12))
    group = np.ones((1, 512), np.int32)
    inputs, weight = made_inputs(1, 512)

    def total(*inputs):
        return jnp.sum(packed_attention(*inputs, group, group - 1) * weight)

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*inputs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 512**2


@pytest.mark.parametrize("sizes", [DENSE, BLOCKS], ids=["dense", "blocks"])
def test_bfloat16_is_close_and_keeps_its_dtype(sizes, monkeypatch):
    use(monkeypatch, sizes)
    group, branch = made_labels(6, 50)
    inputs, weight = made_inputs(6, 50)
    half = [x.astype(jnp.bfloat16) for x in inputs]
    found = value_and_gradient(lambda *x: packed_attention(*x, group, branch), half, weight)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    exact = functools.partial(by_definition, allowed(group, branch))
    expected = value_and_gradient(exact, [x.astype(jnp.float32) for x in half], weight)
    assert_close([x.astype(jnp.float32) for x in found], expected, 0.02)


@pytest.mark.parametrize(
    ("rows", "kv_heads"), [(8, 2), (8, 3), (6, 2)], ids=["split", "3 heads", "6 rows"]
)
def test_mesh_of_2x2x2_equals_one_device(rows, kv_heads, monkeypatch):
    use(monkeypatch, BLOCKS)
    group, branch = made_labels(rows, 50)
    inputs, weight = made_inputs(rows, 50, kv_heads)

    def run(*inputs):
        return packed_attention(*inputs, group, branch)

    expected = value_and_gradient(run, inputs, weight)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert_close(value_and_gradient(run, inputs, weight), expected, 1e-6)


def test_on_a_mesh_nothing_moves_between_devices(monkeypatch):
    use(monkeypatch, BLOCKS)
    group, branch = made_labels(8, 48)
    inputs, _ = made_inputs(8, 48)
    mesh = make_mesh(2, 2, 2)
    spec = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
    placed = jax.device_put(inputs, jax.sharding.NamedSharding(mesh, spec))
    labels = jax.device_put(
        (group, branch), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(spec[0]))
    )

    def both_passes(q, k, v, group, branch):
        out, back = jax.vjp(lambda *x: packed_attention(*x, group, branch), q, k, v)
        return back(out)

    with jax.set_mesh(mesh):
        text = jax.jit(both_passes).lower(*placed, *labels).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


def test_pmap_equals_one_device(monkeypatch):
    use(monkeypatch, BLOCKS)
    group, branch = made_labels(8, 50)
    inputs, weight = made_inputs(8, 50)

    def grads(q, k, v, weight, group, branch):
        total = lambda *x: jnp.sum(packed_attention(*x, group, branch) * weight)  # noqa: E731
        return jax.grad(total, (0, 1, 2))(q, k, v)

    arrays = (*inputs, weight, group, branch)
    split = [x.reshape(4, 2, *x.shape[1:]) for x in arrays]
    found = jax.pmap(grads, axis_name="rows", devices=jax.devices()[:4])(*split)
    whole = [x.reshape(8, *x.shape[2:]) for x in found]
    assert_close(whole, jax.jit(grads)(*arrays), 1e-6)


@pytest.mark.parametrize("unroll", [1, True], ids=["rolled", "unrolled"])
@pytest.mark.parametrize("remat", [False, True], ids=["kept", "checkpoint"])
def test_a_scan_of_layers_equals_the_layers_in_turn(remat, unroll, monkeypatch):
    use(monkeypatch, BLOCKS)
    group, branch = made_labels(4, 30)
    (q, k, v), weight = made_inputs(4, 30)
    layers = jnp.array([1.0, 0.5])

    def layer(q, scale, attend):
        return q + attend(scale * q, k, v), None

    def scanned(q, k, v):
        body = functools.partial(layer, attend=lambda *x: packed_attention(*x, group, branch))
        body = jax.checkpoint(body) if remat else body
        return jax.lax.scan(body, q, layers, unroll=unroll)[0]

    def in_turn(q, k, v):
        exact = functools.partial(by_definition, allowed(group, branch))
        for scale in (1.0, 0.5):
            q, _ = layer(q, scale, exact)
        return q

    inputs = (q, k, v)
    assert_close(
        value_and_gradient(scanned, inputs, weight)[:2],
        value_and_gradient(in_turn, inputs, weight)[:2],
    )


def test_kernels_divide_by_no_empty_sum_and_see_nothing_but_what_is_allowed():
    group, branch = made_labels(4, 50)
    mask = np.asarray(attention._visible(group, branch))
    assert mask.any(-1).all()
    np.testing.assert_array_equal(mask[group != 0], allowed(group, branch)[group != 0])


def test_splash_is_that_of_the_definition_with_rows_of_padding_and_cut_blocks():
    # Three blocks of 128 tokens, the last cut; interpreted here, as there is no TPU.
    group, branch = made_labels(3, 300, longest=60)
    inputs, weight = made_inputs(3, 300, width=8)
    attend = functools.partial(packed_attention, group_BT=group, branch_BT=branch, how="splash")
    found = value_and_gradient(attend, inputs, weight)
    mask = allowed(group, branch)
    assert_close(found, value_and_gradient(functools.partial(by_definition, mask), inputs, weight))
    assert not any(np.any(x[group == 0]) for x in found)


def test_what_cudnn_is_handed_gives_the_definition_by_xla():
    group, branch = made_labels(6, 50)
    inputs, weight = made_inputs(6, 50)
    found = value_and_gradient(
        lambda *x: attention._fused("xla", *x, group, branch), inputs, weight
    )
    mask = allowed(group, branch)
    assert_close(found, value_and_gradient(functools.partial(by_definition, mask), inputs, weight))


@pytest.mark.parametrize(
    ("platform", "dtype", "width", "length", "expected"),
    [
        ("tpu", "float32", 128, 4096, "splash"),
        ("tpu", "float32", 128, 64, "dense"),
        ("gpu", "bfloat16", 128, 4096, "cudnn"),
        ("gpu", "float32", 128, 4096, "blocks"),
        ("gpu", "bfloat16", 256, 4096, "blocks"),
        ("gpu", "bfloat16", 128, 4095, "blocks"),
        ("cpu", "bfloat16", 128, 4096, "blocks"),
    ],
)
def test_the_way_is_chosen_by_platform_size_and_dtype(
    platform, dtype, width, length, expected, monkeypatch
):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    queries = jax.ShapeDtypeStruct((1, length, 2, 4, width), dtype)
    assert attention._chosen(queries) == expected


def test_a_kernel_of_another_device_is_refused():
    group, branch = made_labels(2, 16)
    inputs, _ = made_inputs(2, 16)
    with pytest.raises(ValueError, match="'cudnn' runs on gpu; this program is for cpu"):
        packed_attention(*inputs, group, branch, "cudnn")


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
def test_splash_compiles_for_a_tpu_that_is_not_here(width, monkeypatch):
    """The program of a v5e pod, chosen by its mesh on a machine whose own platform is the CPU."""
    pytest.importorskip("libtpu", reason="libtpu, with which programs for TPUs are compiled")
    for name, value in TPU.items():
        monkeypatch.setenv(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = make_mesh(4, 2, 2, devices=topology.devices)
    rows, length, kv_heads, per_key = 16, 2000, 2, 4
    by_row = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    by_head = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    heads = (rows, length, kv_heads)
    shapes = (*heads, per_key, width), (*heads, width), (*heads, width)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=by_head) for shape in shapes]
    labels = [jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=by_row)] * 2

    def both_passes(q, k, v, group, branch):
        out, back = jax.vjp(lambda *x: packed_attention(*x, group, branch), q, k, v)
        return out, back(out)

    with jax.set_mesh(mesh):
        compiled = jax.jit(both_passes).lower(*arrays, *labels).compile()
    # Forward, gradient of the queries, gradient of keys and values.
    assert compiled.as_text().count("custom-call(") >= 3
    assert "tpu_custom_call" in compiled.as_text()
    # Scores of one head of a device's two rows would take as much.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * length**2 * per_key
