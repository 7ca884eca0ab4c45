"""What a run takes from its settings."""

import dataclasses

import jax
import numpy as np

from paxo import loading
from paxo.data.packing import group_sizes, packing_overhead
from paxo.data.records import TokenGroup
from paxo.experiment import DataSettings
from paxo.models.policy import make_policy
from paxo.models.sharding import make_mesh
from tests.made import TINY


def made_groups(number):
    """Prompts of up to 120 tokens and pairs of completions of up to 60."""
    rng = np.random.default_rng(0)
    ones = lambda most: np.ones(rng.integers(1, most), np.int32)  # noqa: E731
    return [
        TokenGroup(ones(120), (ones(60), ones(60)), (True, True), (1.0, 0.0), {}, i, f"made:{i}")
        for i in range(number)
    ]


def test_rows_follow_from_the_cost_of_the_models_head_and_of_its_attention():
    groups = made_groups(600)

    def shape(**changes):
        config = dataclasses.replace(TINY, **changes)
        return loading.row_shape(groups, DataSettings(), config)

    small, large = shape(vocab_size=16), shape(vocab_size=2048)
    slots = [packing_overhead(group_sizes(groups), found).slots for found in (small, large)]
    assert slots[1] < slots[0]
    assert shape(vocab_size=2048, attention="blocks") == large
    assert shape(vocab_size=2048, attention="dense").length < large.length


def test_the_quickly_compiled_start_is_the_policys_own_to_the_bit():
    config = dataclasses.replace(TINY, vocab_size=512)
    policy, key = make_policy(config), jax.random.key(7)
    found = loading.init_params(policy, config, make_mesh(devices=jax.devices()[:1]), key)
    jax.tree.map(np.testing.assert_array_equal, found, jax.jit(policy.init)(key))
