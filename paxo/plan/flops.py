"""Operations of a run's programs, from the shape of the model; a multiply-add counts as two.

Only matrix products are counted: the rest is a few per cent, and no accelerator is bound by it.
"""

import dataclasses
from typing import NamedTuple

from paxo.models.config import ModelConfig

# Blocks of block-sparse attention: a query meets so many keys beyond those of its own group.
BLOCK = 128
# The backward pass has two products for each of the forward's; in blocks the attention makes its
# scores once more beside them, in chunks the head makes its logits once more.
BACKWARD, ATTENTION_AGAIN, LOGITS_AGAIN = 2.0, 0.5, 1.0


class Forward(NamedTuple):
    """Operations of one forward pass.

    Attributes:
        layers: projections and SwiGLU.
        attention: scores and mixtures, as they are computed.
        needed_attention: the same of pairs of tokens that may see one another.
        adapters: LoRA's products.
        head: logits of the scored positions.
    """

    layers: float
    attention: float
    needed_attention: float
    adapters: float
    head: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What a pass is over.

    Attributes:
        tokens: positions.
        scored: positions that meet the head.
        keys: keys that the computation of a query takes in, on average.
        needed_keys: keys that it may see, on average.
        in_blocks: whether the attention is computed in blocks.
        in_chunks: whether the scored positions meet the head in more than one chunk.
        adapter_params: trained parameters of adapters, of all layers; 0 without LoRA.
    """

    tokens: float
    scored: float
    keys: float
    needed_keys: float
    in_blocks: bool = True
    in_chunks: bool = True
    adapter_params: int = 0


def layer_params(config: ModelConfig) -> int:
    """Weights of the products of one layer.

    >>> from paxo.models.known import known_config
    >>> layer_params(known_config("llama3-8b"))
    218103808
    """
    d, h = config.hidden_size, config.head_dim
    attention = d * h * (2 * config.num_heads + 2 * config.num_kv_heads)
    return attention + 3 * d * config.intermediate_size


def forward_flops(config: ModelConfig, work: Work) -> Forward:
    """Operations of the trunk over all tokens and of the head over the scored ones."""
    per_key = 4.0 * config.num_layers * config.num_heads * config.head_dim * work.tokens
    return Forward(
        layers=2.0 * work.tokens * config.num_layers * layer_params(config),
        attention=per_key * work.keys,
        needed_attention=per_key * work.needed_keys,
        adapters=2.0 * work.tokens * work.adapter_params,
        head=2.0 * work.scored * config.hidden_size * config.vocab_size,
    )


def step_flops(config: ModelConfig, work: Work) -> float:
    """Operations of a training step as it is computed, what `remat` repeats included."""
    forward = forward_flops(config, work)
    backward = _backward(work)
    # No gradient needs the last product of a layer, so it is not repeated.
    last = config.intermediate_size * config.hidden_size / layer_params(config)
    again, attention_again = config.remat == "full", config.remat != "none"
    return (
        forward.layers * (1 + backward + again * (1 - last))
        + forward.attention * (1 + BACKWARD + work.in_blocks * ATTENTION_AGAIN + attention_again)
        + forward.adapters * (1 + BACKWARD + again)
        + forward.head * (1 + backward + work.in_chunks * LOGITS_AGAIN)
    )


def useful_flops(config: ModelConfig, work: Work) -> float:
    """Operations that a step cannot do without, by which utilisation (MFU) is measured."""
    forward, backward = forward_flops(config, work), _backward(work)
    return (forward.layers + forward.head) * (1 + backward) + (
        forward.needed_attention + forward.adapters
    ) * (1 + BACKWARD)


def scorer_flops(config: ModelConfig, work: Work) -> float:
    """Operations of a frozen policy's log-probs."""
    forward = forward_flops(config, work)
    return forward.layers + forward.attention + forward.head


def _backward(work: Work) -> float:
    """Products of the backward pass; frozen weights hand the gradient on and have none."""
    return BACKWARD / 2 if work.adapter_params else BACKWARD


def mean_keys(prompt: float, completion: float, candidates: int) -> float:
    """Keys that a token of a group may see, on average.

    >>> mean_keys(prompt=100, completion=0, candidates=1)
    50.0
    """
    seen = prompt**2 / 2 + candidates * completion * (prompt + completion / 2)
    return seen / (prompt + candidates * completion)
