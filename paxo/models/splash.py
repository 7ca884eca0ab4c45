"""Splash attention on TPU with a mask that is data: JAX's Pallas kernels, one row at a time.

The kernels pass over blocks of scores that a mask leaves empty. Their public constructor wants the
mask when a program is built, and packed rows have another mask in every batch, so the functions
beneath it are called here. What a mask is worked up into is as large as the mask itself: it is made
again in the backward pass rather than kept for every layer.

Shapes in names: T tokens, a multiple of 128, G key-value heads, Q query heads a key-value head, H
head width. On CPU the kernels are interpreted, slowly: for tests.
"""

from typing import Any

import jax

from paxo.models.sharding import platform

Array = jax.Array
# The kernels' unit, and the sizes of blocks that are tried; larger ones keep a TPU busier.
LANES = 128
BLOCKS = (512, 256, 128)


def splash_forward(
    q_TGQH: Array, k_TGH: Array, v_TGH: Array, mask_TT: Array
) -> tuple[Array, Array]:
    """Softmax attention where the mask holds, which it must somewhere for every query.

    Returns:
        `[T, G, Q, H]` in the dtype of the queries, and `[G, Q, T]` float32, the log of each query's
        sum of exponentials.
    """
    kernel, infos = _kernel()
    info, _ = infos.process_dynamic_mask(mask_TT[None], (_block(mask_TT),) * 2)
    q, k, v = _scaled(q_TGQH), _heads_first(k_TGH), _heads_first(v_TGH)
    out, (lse,) = kernel._splash_attention_forward(
        _joined(info),
        q,
        k,
        v,
        None,
        None,
        save_residuals=True,
        **_settings(mask_TT),
    )
    t, g, per_key, _ = q_TGQH.shape
    return _tokens_first(out, q_TGQH.shape), lse.reshape(g, per_key, t)


def splash_backward(
    q_TGQH: Array,
    k_TGH: Array,
    v_TGH: Array,
    mask_TT: Array,
    out_TGQH: Array,
    lse_GQT: Array,
    d_out_TGQH: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values, from what `splash_forward` took and gave."""
    kernel, infos = _kernel()
    blocks = (_block(mask_TT),) * 2
    for_queries, _ = infos.process_dynamic_mask(mask_TT[None], blocks)
    for_keys, _ = infos.process_dynamic_mask_dkv(mask_TT[None], blocks)
    t, _, _, h = q_TGQH.shape
    kept = (
        _scaled(q_TGQH),
        _heads_first(k_TGH),
        _heads_first(v_TGH),
        None,
        None,
        _heads_first(out_TGQH.reshape(t, -1, h)),
        lse_GQT.reshape(-1, t),
        _joined(for_queries),
        _joined(for_keys),
    )
    d_out = _heads_first(d_out_TGQH.reshape(t, -1, h))
    settings = {"save_residuals": False, **_settings(mask_TT)}
    _, _, _, d_q, d_k, d_v, _, _ = kernel._splash_attention_bwd(**settings, res=kept, do=d_out)
    d_q = _tokens_first(d_q, q_TGQH.shape) * q_TGQH.shape[-1] ** -0.5
    return d_q, _heads_first(d_k), _heads_first(d_v)


def _kernel() -> tuple[Any, Any]:
    """Imported on use: Pallas takes a while to load."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask_info,
    )

    return splash_attention_kernel, splash_attention_mask_info


def _settings(mask: Array) -> dict[str, Any]:
    kernel, _ = _kernel()
    block = _block(mask)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return {
        "mask_value": kernel.DEFAULT_MASK_VALUE,
        "is_mqa": False,
        "block_sizes": sizes,
        "residual_checkpoint_name": None,
        "mask_function": None,
        "attn_logits_soft_cap": None,
        "interpret": platform() == "cpu",
    }


def _block(mask: Array) -> int:
    return next(size for size in BLOCKS if len(mask) % size == 0)


def _joined(info: Any) -> Any:
    """With the blocks of the mask in a row, as the kernels read them."""
    blocks = info.partial_mask_blocks
    return info._replace(partial_mask_blocks=blocks.reshape(-1, *blocks.shape[-2:]))


def _scaled(q: Array) -> Array:
    t, g, per_key, h = q.shape
    return _heads_first((q * h**-0.5).reshape(t, g * per_key, h))


def _heads_first(x: Array) -> Array:
    """`[T, G, H] -> [G, T, H]`, and back."""
    return x.swapaxes(0, 1)


def _tokens_first(x: Array, shape: tuple[int, ...]) -> Array:
    return x.swapaxes(0, 1).reshape(shape)
