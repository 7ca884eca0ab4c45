r"""Diffusion models: pairs of images as functions of their denoising errors.

An error is $e = \overline{\|\epsilon - \epsilon_\theta(x_t, t, c)\|^2}$, the mean over the
dimensions of the noise, at one timestep; policy and reference see the same noise and timestep.
$-e/2$ takes the place of a log-prob. Personalised diffusion (PPD, Dang et al. 2025,
arXiv:2501.06655) is `diffusion_dpo_loss` of a denoiser that is given the user as well; D3PO works
on log-probs of steps and is `paxo.losses.tokenwise.d3po_loss`.

>>> errors, reference = jnp.array([0.1, 0.3]), jnp.array([0.2, 0.2])
>>> diffusion_dpo_loss(errors, reference, beta=10.0)
Array(0.3132617, dtype=float32)
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.losses.contract import Positive
from paxo.losses.pairwise import check_candidates, margin, pair_log_ratios
from paxo.numerics import Array, masked_rows


def diffusion_dpo_loss(
    denoising_errors: Array,
    reference_denoising_errors: Array,
    *,
    beta: Positive = 5000.0,
    where: Array | None = None,
) -> Array:
    r"""Diffusion-DPO: $-\log\sigma(-\frac\beta2[(e_w - e^{ref}_w) - (e_l - e^{ref}_l)])$.

    The chosen image shall be denoised better than the reference does, by more than the rejected.
    It is DPO with the log-ratios $-(e - e^{ref})/2$.

    Args:
        denoising_errors: `[..., 2]` mean squared errors of the denoiser, chosen first.
        reference_denoising_errors: `[..., 2]` the same of the reference, on the same noise.
        beta: strength of the KL regularisation, > 0; the number of timesteps and their weight are
            in it.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where both denoise alike, 0 where a candidate is masked.

    >>> diffusion_dpo_loss(jnp.array([0.2, 0.2]), jnp.array([0.2, 0.2]))
    Array(0.6931472, dtype=float32)

    Wallace et al. 2023, arXiv:2311.12908 (number from memory), in the form of the authors' code.
    """
    check_candidates(denoising_errors, reference_denoising_errors, where)
    excess = _excess(denoising_errors, reference_denoising_errors, where)
    return masked_rows(jax.nn.softplus(beta / 2 * margin(excess)), where)


def seppo_loss(
    denoising_errors: Array,
    reference_denoising_errors: Array,
    *,
    beta: Positive = 5000.0,
    flip: Literal["adaptive", "never"] = "adaptive",
    where: Array | None = None,
) -> Array:
    r"""SePPO, experimental: a good image against one that an earlier checkpoint made.

    $-\log\sigma(-\frac\beta2[(e_w - e^{ref}_w) - s(e_g - e^{ref}_g)])$ with $s = 1$: the
    checkpoint's image $g$ is the loser. Where that checkpoint denoises the good image better than
    the policy does ($e^{ref}_w < e_w$) its image is taken as good too, $s = -1$: the policy is to
    denoise both better.

    Args:
        denoising_errors: `[..., 2]` mean squared errors of the denoiser: the good image, and the
            image of the reference.
        reference_denoising_errors: `[..., 2]` the same of the reference, an earlier checkpoint
            drawn at random, on the same noise.
        beta: strength of the KL regularisation, > 0; the default is Diffusion-DPO's.
        flip: "adaptive" as above, "never" keeps s = 1: `diffusion_dpo_loss`.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where both denoise alike, 0 where a candidate is masked.

    >>> seppo_loss(jnp.array([0.3, 0.1]), jnp.array([0.2, 0.2]), beta=10.0)  # s = -1
    Array(0.6931472, dtype=float32)

    Zhang et al. 2024, arXiv:2410.05255, from a review that quotes Eq. 7; the direction of the
    criterion is inferred. The authors' repository holds inference code only.
    """
    check_candidates(denoising_errors, reference_denoising_errors, where)
    excess = _excess(denoising_errors, reference_denoising_errors, where)
    sign = jnp.ones_like(excess[..., 0])
    if flip == "adaptive":
        sign = jnp.where(excess[..., 0] > 0, -sign, sign)
    return masked_rows(jax.nn.softplus(beta / 2 * (excess[..., 0] - sign * excess[..., 1])), where)


def _excess(errors: Array, reference_errors: Array, where: Array | None) -> Array:
    """`[..., 2]` errors beyond the reference's, whose own carry no gradient."""
    return pair_log_ratios(errors, jax.lax.stop_gradient(reference_errors), where)
