"""Extra trained outputs of a decoder: rewards, values, weights of tokens.

Each is a linear function of the hidden states, float32, whose parameters lie beside the decoder's
under `params["heads"][name]`. A loss asks for one by naming its argument alike.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from paxo.types import Array, Params, Policy

# "scores" is read at a completion's last token, the others at every scored one.
HEADS = ("scores", "values", "token_weights")


def with_heads(policy: Policy, width: int, names: Sequence[str]) -> Policy:
    """The same policy with a linear head of each name.

    Args:
        policy: a decoder.
        width: D of its hidden states.
        names: of `HEADS`.

    Raises:
        ValueError: for another name.

    >>> from paxo.models.config import ModelConfig
    >>> from paxo.models.policy import make_policy
    >>> config = ModelConfig(vocab_size=16, hidden_size=8, num_layers=1, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, intermediate_size=16, max_positions=32)
    >>> policy = with_heads(make_policy(config), 8, ["values"])
    >>> params = policy.init(jax.random.key(0))
    >>> policy.heads["values"](params, jnp.zeros((2, 3, 8))).shape
    (2, 3)
    """
    unknown = sorted(set(names) - set(HEADS))
    if unknown:
        raise ValueError(f"unknown heads {unknown}; known: {', '.join(HEADS)}")
    if not names:
        return policy

    def init(key: Array) -> Params:
        return policy.init(key) | {"heads": init_heads(key, width, names)}

    axes = {name: {"kernel": ("norm",), "bias": ()} for name in names}
    return dataclasses.replace(
        policy,
        init=init,
        logical_axes=policy.logical_axes | {"heads": axes},
        heads={
            name: lambda params, hidden, name=name: _linear(params, hidden, name) for name in names
        },
    )


def init_heads(key: Array, width: int, names: Sequence[str]) -> Params:
    """First parameters: outputs of about unit variance on normalised hidden states, no bias."""
    keys = jax.random.split(jax.random.fold_in(key, 1), len(names))
    return {
        name: {
            "kernel": jax.random.normal(k, (width,)) / (width + 1) ** 0.5,
            "bias": jnp.zeros(()),
        }
        for name, k in zip(names, keys)
    }


def without_heads(params: Params) -> Params:
    """The decoder's parameters alone, as they are exported."""
    return {name: x for name, x in params.items() if name != "heads"}


def _linear(params: Params, hidden: Array, name: str) -> Array:
    head = params["heads"][name]
    # A sum rather than a product of matrices: float32 on every backend.
    return jnp.sum(hidden.astype(jnp.float32) * head["kernel"], -1) + head["bias"]
