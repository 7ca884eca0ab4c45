r"""Symbolic specifications compiled to losses (experimental).

>>> loss = compile_loss(SPECIFICATIONS["orpo"])
>>> loss(jnp.array([-4.0, -4.0]), jnp.array([4, 4]))
Array(0.6931472, dtype=float32)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from paxo.losses.contract import Positive, checked
from paxo.losses.logic import POLICY, REFERENCE, SPECIFICATIONS, Specification, World, symmetric
from paxo.losses.pairwise import check_candidates
from paxo.numerics import (
    Array,
    at_least_float32,
    log1mexp,
    logsumexp,
    masked,
    masked_rows,
    safe_divide,
)

SemanticLink = Literal["logistic", "ipo", "slic", "rrhf"]


def log_odds(spec: Specification, log_probs: Mapping[str, Array]) -> Array:
    r"""$\rho$ `[...]` in nats, from the log-probs `[...]` of the variables.

    >>> w, l = jnp.log(jnp.array([0.5, 0.2]))
    >>> log_odds(SPECIFICATIONS["cpo"], {"w": w, "l": l})  # log(0.5 / 0.2)
    Array(0.9162907, dtype=float32)
    """
    of = functools.partial(_log_weight, names=spec.variables, log_probs=log_probs)
    return of(spec.favourable) - of(spec.adverse)


def compile_loss(
    spec: Specification,
    *,
    link: SemanticLink = "logistic",
    beta: float = 1.0,
    length_normalize: bool = True,
) -> Callable[..., Array]:
    """The loss of a specification: `semantic_loss` or `semantic_reference_loss` with it bound.

    Takes `(policy_logps, lengths, where=None)`, or `(policy_logps, reference_logps, lengths,
    where=None)` for a specification that names the reference.
    """
    names_reference = spec.variables != POLICY
    return functools.partial(
        semantic_reference_loss if names_reference else semantic_loss,
        **dataclasses.asdict(spec),
        link=link,
        beta=beta,
        length_normalize=length_normalize,
    )


def _check(core: str, given: str, also: str) -> None:
    """The formulas can be read, and leave worlds on both sides."""
    spec = Specification(core, given, also)
    spec.favourable, spec.adverse  # noqa: B018 - they raise


def _check_without_reference(core: str, given: str, also: str) -> None:
    _check(core, given, also)
    if Specification(core, given, also).variables != POLICY:
        raise ValueError(
            f"{core!r}, {given!r}, {also!r} name the reference: use semantic_reference"
        )


@checked(_check_without_reference)
def semantic_loss(
    policy_logps: Array,
    lengths: Array,
    *,
    core: str = "l -> w",
    given: str = "true",
    also: str = "false",
    link: SemanticLink = "logistic",
    beta: Positive = 1.0,
    length_normalize: bool = True,
    where: Array | None = None,
) -> Array:
    r"""Loss of a symbolic specification without reference (experimental): $f(\rho)$.

    By default $-\log P(l \to w) = -\log(1 - p_l(1 - p_w))$.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        lengths: `[..., 2]` scored tokens of each completion.
        core: what should hold of `w` and `l`.
        given: condition under which it is asked.
        also: worlds that count on both sides.
        link: "logistic" $-\log\sigma(\beta\rho)$, "ipo" $(\rho - 1/(2\beta))^2$, "slic"
            $\max(0, \beta - \rho)$ or "rrhf" $\max(0, -\beta\rho)$.
        beta: scale of the link, > 0.
        length_normalize: probabilities are geometric means over tokens; False for whole sequences,
            where $1 - p$ is 1 to all digits.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> semantic_loss(jnp.log(jnp.array([0.5, 0.5])), jnp.ones(2))  # -log(3/4)
    Array(0.2876821, dtype=float32)

    Richardson et al. 2024, arXiv:2412.17696. TRL, EasyDeL and HALOs do not have it.
    """
    check_candidates(policy_logps, lengths, where)
    logps = _log_probs(policy_logps, lengths, where, length_normalize)
    spec = Specification(core, given, also)
    if spec.variables != POLICY:
        raise ValueError(f"{spec} names the reference; use semantic_reference_loss")
    rho = log_odds(spec, dict(zip(POLICY, jnp.moveaxis(logps, -1, 0))))
    return masked_rows(_linked(rho, link, beta), where)


@checked(_check)
def semantic_reference_loss(
    policy_logps: Array,
    reference_logps: Array,
    lengths: Array,
    *,
    core: str = SPECIFICATIONS["dpo"].core,
    given: str = SPECIFICATIONS["dpo"].given,
    also: str = SPECIFICATIONS["dpo"].also,
    link: SemanticLink = "logistic",
    beta: Positive = 1.0,
    length_normalize: bool = True,
    where: Array | None = None,
) -> Array:
    r"""Loss of a symbolic specification with a reference (experimental): $f(\rho)$, by default DPO.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        lengths: `[..., 2]` scored tokens of each completion.
        core: what should hold of `w`, `l`, `rw` and `rl`.
        given: condition under which it is asked.
        also: worlds that count on both sides.
        link: as in `semantic_loss`.
        beta: scale of the link, > 0.
        length_normalize: as in `semantic_loss`; without it the default is `dpo` on whole sequences.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> policy, reference, lengths = jnp.array([-4., -6.]), jnp.array([-5., -5.]), jnp.ones(2)
    >>> semantic_reference_loss(policy, reference, lengths, beta=0.5)
    Array(0.3132617, dtype=float32)

    Richardson et al. 2024, arXiv:2412.17696. TRL, EasyDeL and HALOs do not have it.
    """
    check_candidates(policy_logps, reference_logps, lengths, where)
    both = [
        _log_probs(x, lengths, where, length_normalize) for x in (policy_logps, reference_logps)
    ]
    names = POLICY + REFERENCE
    logps = jnp.moveaxis(jnp.concatenate(both, axis=-1), -1, 0)
    rho = log_odds(Specification(core, given, also), dict(zip(names, logps)))
    return masked_rows(_linked(rho, link, beta), where)


def _linked(rho: Array, link: SemanticLink, beta: float) -> Array:
    if link == "logistic":
        return jax.nn.softplus(-beta * rho)
    if link == "ipo":
        return jnp.square(rho - 1 / (2 * beta))
    return jax.nn.relu(beta - rho) if link == "slic" else jax.nn.relu(-beta * rho)


def _log_probs(logps: Array, lengths: Array, where: Array | None, per_token: bool) -> Array:
    logps = masked(at_least_float32(logps), where)
    return safe_divide(logps, masked(lengths, where)) if per_token else logps


def _log_weight(
    worlds: tuple[World, ...], names: tuple[str, ...], log_probs: Mapping[str, Array]
) -> Array:
    """Log of the weights' sum. Variables that do not matter are summed out beforehand, exactly."""
    matters = [i for i in range(len(names)) if not symmetric(worlds, i)]
    literal = functools.cache(
        lambda i, true: log_probs[names[i]] if true else log1mexp(log_probs[names[i]])
    )
    reduced = sorted({tuple((i, world[i]) for i in matters) for world in worlds})
    log_one = jnp.zeros_like(log_probs[names[0]])
    terms = [sum((literal(i, x) for i, x in world), start=log_one) for world in reduced]
    return terms[0] if len(terms) == 1 else logsumexp(jnp.stack(terms, axis=-1))
