"""AdamW's schedules by formula, what it decays, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.training.optimizers import AdamW, adamw, decay_mask

PEAK = 3e-4


def rates(steps, num_steps=None, **settings):
    schedule = adamw(PEAK, **settings).build(num_steps).schedule
    return [float(schedule(jnp.int32(step))) for step in steps]


def test_constant_rate_needs_no_length_of_the_run():
    assert rates([0, 5, 10**6]) == pytest.approx([PEAK] * 3)


@pytest.mark.parametrize("warmup", [1, 2, 10])
def test_warm_up_grows_linearly_and_its_first_update_moves(warmup):
    expected = [PEAK * min(step + 1, warmup) / warmup for step in range(13)]
    assert rates(range(13), warmup_steps=warmup) == pytest.approx(expected)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_linear_schedule_falls_on_a_line_to_the_final_fraction(final):
    found = rates(range(51), 50, schedule="linear", warmup_steps=10, final_fraction=final)
    after = [PEAK * (1 - (1 - final) * (step - 10) / 40) for step in range(10, 51)]
    assert found[10:] == pytest.approx(after, rel=1e-5, abs=1e-10)
    assert found[9] == pytest.approx(PEAK)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_schedule_falls_along_half_a_wave(final):
    found = rates(range(51), 50, schedule="cosine", warmup_steps=10, final_fraction=final)
    wave = [0.5 * (1 + math.cos(math.pi * (step - 10) / 40)) for step in range(10, 51)]
    expected = [PEAK * (final + (1 - final) * w) for w in wave]
    assert found[10:] == pytest.approx(expected, rel=1e-5, abs=1e-10)


def test_rate_stays_at_the_end_and_decay_steps_go_before_the_run_length():
    settings = {"schedule": "linear", "decay_steps": 20, "final_fraction": 0.25}
    assert rates([20, 21, 999], 1000, **settings) == pytest.approx([PEAK / 4] * 3)


def test_run_shorter_than_its_warm_up_only_warms_up():
    expected = [PEAK * (step + 1) / 10 for step in range(5)]
    assert rates(range(5), 5, schedule="cosine", warmup_steps=10) == pytest.approx(expected)


PARAMS = {
    "embed": {"embedding": jnp.ones((2, 2))},
    "layers": {
        "qkv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2)},
    },
}


def test_kernels_and_embeddings_are_decayed_norms_and_biases_are_not():
    assert decay_mask(PARAMS) == {
        "embed": {"embedding": True},
        "layers": {"qkv": {"kernel": True, "bias": False}, "norm": {"scale": False}},
    }


def one_update(gradients, **settings):
    optimizer = adamw(0.1, **settings).build()
    return optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)


def test_decay_moves_decayed_parameters_by_rate_times_decay_alone():
    updates, _ = one_update(jax.tree.map(jnp.zeros_like, PARAMS), weight_decay=0.5)
    np.testing.assert_allclose(updates["embed"]["embedding"], -0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["layers"]["qkv"]["kernel"], -0.1 * 0.5, rtol=1e-6)
    for kept in (updates["layers"]["qkv"]["bias"], updates["layers"]["norm"]["scale"]):
        np.testing.assert_array_equal(kept, 0)


def first_moment(state):
    found = [
        x
        for path, x in jax.tree_util.tree_flatten_with_path(state)[0]
        if ".mu" in jax.tree_util.keystr(path)
    ]
    return np.concatenate([np.ravel(x).astype(np.float32) for x in found])


@pytest.mark.parametrize(("most", "expected"), [(None, 6.0), (100.0, 6.0), (1.5, 1.5)])
def test_gradients_are_clipped_by_their_global_norm(most, expected):
    # 12 entries of sqrt(3) have the norm 6; the first moment is 1 - b1 times the clipped gradient.
    gradients = jax.tree.map(lambda x: x * math.sqrt(3), PARAMS)
    _, state = one_update(gradients, max_grad_norm=most)
    assert np.linalg.norm(first_moment(state)) == pytest.approx(0.1 * expected, rel=1e-5)


def test_first_update_of_adam_is_the_rate_times_the_sign():
    gradients = jax.tree.map(lambda x: -2.0 * x, PARAMS)
    updates, _ = one_update(gradients, eps=1e-12)
    for x in jax.tree.leaves(updates):
        np.testing.assert_allclose(x, 0.1, rtol=1e-5)


def test_first_moment_is_kept_in_the_dtype_asked_for():
    state = adamw(0.1, moments_dtype="bfloat16").build().init(PARAMS)
    kinds = {
        jax.tree_util.keystr(path): x.dtype
        for path, x in jax.tree_util.tree_flatten_with_path(state)[0]
    }
    assert {kind for name, kind in kinds.items() if ".mu" in name} == {jnp.dtype("bfloat16")}
    assert {kind for name, kind in kinds.items() if ".nu" in name} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0; got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0; got nan"),
        ({"eps": -1e-8}, "eps must be above 0"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative; got -1"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"weight_decay": math.nan}, "weight_decay must not be negative; got nan"),
        ({"final_fraction": -0.1}, "final_fraction must not be negative"),
        ({"b1": 1.0}, r"b1 must lie in \[0, 1\); got 1.0"),
        ({"b2": -0.1}, r"b2 must lie in \[0, 1\)"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, or none"),
        ({"schedule": "step"}, "schedule must be constant, linear or cosine; got 'step'"),
        (
            {"moments_dtype": "float8"},
            "moments_dtype must be float32, bfloat16 or none; got 'float8'",
        ),
        (
            {"decay_steps": 10, "warmup_steps": 10},
            "decay_steps must exceed warmup_steps; got 10 and 10",
        ),
    ],
)
def test_settings_out_of_range_are_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=f"optimizer.{message}"):
        AdamW(**{"learning_rate": 1e-3, **settings})


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_without_an_end_is_refused(schedule):
    with pytest.raises(ValueError, match=f"'{schedule}' needs decay_steps or the run's num_steps"):
        adamw(1e-3, schedule=schedule).build()
