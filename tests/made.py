"""Small made models and batches that tests share."""

import functools

import jax
import numpy as np

from paxo.data.packing import choose_shape, group_sizes, pack_groups, pack_rows, pad_rows
from paxo.data.records import TokenGroup
from paxo.models.config import ModelConfig
from paxo.models.policy import make_policy

TINY = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    max_positions=64,
    initializer_range=0.3,
)


@functools.cache
def tiny_policy(seed=0, **changes):
    """A random decoder with weights large enough that its log-probs differ, and its parameters."""
    import dataclasses

    policy = make_policy(dataclasses.replace(TINY, **changes))
    return policy, policy.init(jax.random.key(seed))


def made_groups(num, *, candidates=2, ragged=False, seed=0, vocab=40, longest=7):
    """Groups of random tokens; with `ragged`, of 1 to `candidates` candidates."""
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(num):
        k = int(rng.integers(1, candidates + 1)) if ragged else candidates
        completions = tuple(
            rng.integers(3, vocab, int(rng.integers(1, longest))).astype(np.int32) for _ in range(k)
        )
        labels = (
            (1.0, 0.0)[:k] if candidates == 2 else tuple(float(x) for x in rng.integers(0, 4, k))
        )
        prompt = rng.integers(3, vocab, int(rng.integers(1, 9))).astype(np.int32)
        groups.append(TokenGroup(prompt, completions, (True,) * k, labels, {}, i, f"made:{i + 1}"))
    return groups


def made_batch(num=10, *, rows=8, length=48, **kwargs):
    """Made groups packed into `rows` rows, some of them empty or with masked candidates."""
    groups = made_groups(num, **kwargs)
    shape = choose_shape(groups, row_length=length)
    batch, _ = pack_groups(groups, shape)
    return pad_rows(batch, rows)


def whole_and_alone(groups):
    """For tests of packing: sizes and rows of the groups, and the shape."""
    shape = choose_shape(groups)
    return pack_rows(*group_sizes(groups), shape), shape
