"""Extra trained outputs of a decoder: rewards, values, weights of tokens, embeddings.

Each is a linear function of the hidden states, float32, whose parameters lie beside the decoder's
under `params["heads"][name]`. A loss asks for one by naming its argument alike.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from paxo.types import Array, Params, Policy

# Name -> width of the output, None for one number. "scores" and "embeddings" are read at a
# completion's last token, "degree_logits" at that of a group's last completion, "step_scores" at
# every scored token, and the others where the scored tokens are predicted.
HEADS: dict[str, int | None] = {
    "scores": None,
    "values": None,
    "step_scores": None,
    "token_weights": None,
    "kl_token_weights": None,
    "embeddings": 2,
    "degree_logits": 4,
}


def head_widths(names: Sequence[str]) -> dict[str, int | None]:
    """Name -> width of each head; a later entry of a name counts.

    Args:
        names: of `HEADS`, those of vectors perhaps with their width, as in "embeddings:8".

    Raises:
        ValueError: for another name, or a width that it cannot have.

    >>> head_widths(["values", "embeddings:8"])
    {'values': None, 'embeddings': 8}
    """
    widths = {}
    for entry in names:
        name, told, width = entry.partition(":")
        if name not in HEADS:
            raise ValueError(f"unknown heads {[name]}; known: {', '.join(HEADS)}")
        if told and (HEADS[name] is None or not width.isdecimal() or int(width) < 1):
            wide = ", ".join(f"{n}:{w}" for n, w in HEADS.items() if w is not None)
            raise ValueError(f"head {entry!r}: only vectors have a width, such as {wide}")
        widths[name] = int(width) if told else HEADS[name]
        if name == "embeddings" and widths[name] % 2:
            raise ValueError(f"head {entry!r}: embeddings are blocks of two, give an even width")
    return widths


def with_heads(policy: Policy, width: int, names: Sequence[str]) -> Policy:
    """The same policy with a linear head of each name.

    Args:
        policy: a decoder.
        width: D of its hidden states.
        names: of `HEADS`, see `head_widths`.

    Raises:
        ValueError: for another name.

    >>> from paxo.models.config import ModelConfig
    >>> from paxo.models.policy import make_policy
    >>> config = ModelConfig(vocab_size=16, hidden_size=8, num_layers=1, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, intermediate_size=16, max_positions=32)
    >>> policy = with_heads(make_policy(config), 8, ["values", "embeddings:6"])
    >>> params = policy.init(jax.random.key(0))
    >>> hidden = jnp.zeros((2, 3, 8))
    >>> [policy.heads[name](params, hidden).shape for name in ("values", "embeddings")]
    [(2, 3), (2, 3, 6)]
    """
    widths = head_widths(names)
    if not names:
        return policy

    def init(key: Array) -> Params:
        return policy.init(key) | {"heads": init_heads(key, width, names)}

    axes = {
        name: {"kernel": ("norm",), "bias": ()}
        if out is None
        else {"kernel": ("norm", None), "bias": (None,)}
        for name, out in widths.items()
    }
    return dataclasses.replace(
        policy,
        init=init,
        logical_axes=policy.logical_axes | {"heads": axes},
        heads={
            name: lambda params, hidden, name=name: _linear(params, hidden, name) for name in widths
        },
    )


def init_heads(key: Array, width: int, names: Sequence[str]) -> Params:
    """First parameters: outputs of about unit variance on normalised hidden states, no bias."""
    widths = head_widths(names)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(widths))
    return {
        name: {
            "kernel": jax.random.normal(k, (width, *_shape(out))) / (width + 1) ** 0.5,
            "bias": jnp.zeros(_shape(out)),
        }
        for k, (name, out) in zip(keys, widths.items())
    }


def without_heads(params: Params) -> Params:
    """The decoder's parameters alone, as they are exported."""
    return {name: x for name, x in params.items() if name != "heads"}


def _linear(params: Params, hidden: Array, name: str) -> Array:
    head = params["heads"][name]
    hidden, kernel = hidden.astype(jnp.float32), head["kernel"]
    if kernel.ndim == 1:
        # A sum rather than a product of matrices: float32 on every backend.
        return jnp.sum(hidden * kernel, -1) + head["bias"]
    return jnp.matmul(hidden, kernel, precision=jax.lax.Precision.HIGHEST) + head["bias"]


def _shape(width: int | None) -> tuple[int, ...]:
    return () if width is None else (width,)
