"""What every loss must do, as functions `check_*(case)` that raise AssertionError.

A case is a row of `paxo.objectives.LOSSES`; its arrays are made from the names in its signature.
All cases have the same shapes, so that the operations of one loss are compiled for the others too.
"""

import functools
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np

from paxo.losses.contract import Range
from paxo.numerics import Mean
from paxo.objectives import FROM_STEP
from tests.compiling import compilations
from tests.losses.cases import LEAD, TOKENS, axes_of, differentiated, made_inputs

SOURCE = re.compile(r"arXiv:\d{4}\.\d{4,5}|https?://\S+")


def evaluate(case, inputs, **hyper_parameters):
    """The loss `[...]` or `Mean`, and the new state or ()."""
    result = case.loss(**inputs, **(case.hyper_parameters | hyper_parameters))
    return result if "state" in inputs else (result, ())


def total_of(result):
    """One number, for gradients."""
    return jnp.sum(result.total if isinstance(result, Mean) else result)


def value_and_gradient(case, inputs):
    """`((total, (result, state)), gradient with respect to what is trained)`."""
    trained = {name: inputs[name] for name in differentiated(case, inputs)}

    def run(trained):
        result, state = evaluate(case, {**inputs, **trained})
        return total_of(result), (result, state)

    return jax.value_and_grad(run, has_aux=True)(trained)


@functools.cache
def jitted(case):
    """`(inputs) -> ((total, (loss, new state)), gradient)`, compiled once for all checks."""
    return jax.jit(lambda inputs: value_and_gradient(case, inputs))


def assert_close(found, expected, what, rtol=2e-5, atol=1e-6):
    """Equality of two trees, with the case's complaint in front."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol, atol, err_msg=what)


def assert_finite(tree, what):
    """No NaN and no infinity anywhere."""
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        assert np.isfinite(x).all(), f"{what}: {jax.tree_util.keystr(path)} is {np.asarray(x)}"


def check_shape(case):
    """`[..., K] -> [...]` or a `Mean`; `where` may be left out, and so may optional arrays."""
    inputs = made_inputs(case)
    result, _ = evaluate(case, inputs)
    if isinstance(result, Mean):
        assert result.total.shape == result.count.shape in ((), LEAD), (
            f"{case}: total {result.total.shape} and count {result.count.shape} of the Mean must "
            f"both be scalars or {LEAD}"
        )
    else:
        assert result.shape == LEAD, (
            f"{case}: [..., K] -> [...] must give {LEAD} and not {result.shape}; no mean inside, "
            "or return a Mean"
        )
    without = {name: x for name, x in inputs.items() if name != "where"}
    assert_close(evaluate(case, without)[0], result, f"{case}: without where is not where=True")
    optional = [
        p.name for p in case.parameters if p.name in case.arrays and p.default is not p.empty
    ]
    evaluate(case, {name: x for name, x in inputs.items() if name not in optional})


def check_transforms(case):
    """jit, vmap and pmap give what an eager call gives."""
    inputs = made_inputs(case)
    eager = evaluate(case, inputs)
    (_, jitted_result), _ = jitted(case)(inputs)
    assert_close(jitted_result, eager, f"{case}: jit differs from eager")
    if case.coupled or case.takes_key:
        return
    summed = lambda result: jax.tree.map(lambda x: np.asarray(x).sum(), result)  # noqa: E731
    one = lambda part: evaluate(case, part)[0]  # noqa: E731
    # Under jit one program is compiled, which takes less time than each operation of a batch.
    for name, transformed in (("vmap", jax.jit(jax.vmap(one))), ("pmap", jax.pmap(one))):
        mapped = transformed(inputs)
        same = (
            (mapped, eager[0]) if not isinstance(mapped, Mean) else map(summed, (mapped, eager[0]))
        )
        assert_close(*same, f"{case}: {name} differs from eager; @whole_batch if groups couple")


def check_masked(case):
    """Masked candidates and tokens may hold NaN and infinities: neither value nor gradient sees."""
    where = np.ones((*LEAD, case.candidates), bool)
    where[0, 1, -1], where[1, 2], where[1, 0, 0] = False, False, False
    where[0, 2, 1:] = False  # a list of one
    inputs = made_inputs(case) | {"where": jnp.asarray(where)}
    expected = None
    for junk in (-3.0, np.nan, np.inf, -np.inf):
        filled = {name: _with_junk(case, name, x, inputs, junk) for name, x in inputs.items()}
        found = jitted(case)(filled)
        assert_finite(found, f"{case}: {junk} at masked candidates or tokens gets through")
        expected = found if expected is None else expected
        assert_close(found, expected, f"{case}: {junk} at masked candidates changes the result")
        for name, gradient in found[1].items():
            gone = ~np.asarray(_kept(gradient, inputs, axes_of(case, name)))
            assert not np.asarray(gradient)[gone].any(), (
                f"{case}: {name} has a gradient where masked"
            )


def _with_junk(case, name, x, inputs, junk):
    if name in ("where", "token_mask", *FROM_STEP):
        return x
    return jnp.where(_kept(x, inputs, axes_of(case, name)), x, junk)


def _kept(x, inputs, axes):
    """Where an array with those axes holds something."""
    where = inputs["where"]
    if axes in ("", "K"):
        return where if axes else True
    if axes == "KK":
        return where[..., :, None] & where[..., None, :]
    return jnp.broadcast_to(where[..., None], x.shape) & inputs.get("token_mask", True)


def check_extremes(case):
    """Finite value and gradient at margins of ±1e4 nats and lengths of 1 to 1e5 tokens."""
    policy = np.zeros((6, case.candidates), np.float32)
    policy[:, 0::2] = np.array([-1e4, -2e4, -1e4, -2e4, 0, -1e4])[:, None]
    policy[:, 1::2] = np.array([-2e4, -1e4, -2e4, -1e4, -1e4, 0])[:, None]
    lengths = np.array([1, 1, 1e5, 1e5, 1, 10], np.float32)[:, None] * np.ones_like(policy)
    lengths[1, 0], lengths[2, 0] = 1e5, 1
    inputs = made_inputs(case)
    shape = (*LEAD, case.candidates)
    for name, x in inputs.items():
        if name == "lengths":
            inputs[name] = jnp.asarray(lengths.reshape(shape))
        elif name.endswith("_logps") and x.ndim in (3, 4):
            whole = policy if name.startswith("policy_") else np.full_like(policy, -1.5e4)
            whole = whole.reshape(shape)
            whole = whole if x.ndim == 3 else np.repeat(whole[..., None] / TOKENS, TOKENS, -1)
            inputs[name] = jnp.asarray(whole, jnp.float32)
        elif name == "token_mask":
            inputs[name] = jnp.ones_like(x)
    assert_finite(jitted(case)(inputs), f"{case}: not finite at margins of ±1e4")


def check_dtypes(case):
    """float32 out of bfloat16, computed in float32, and float64 out of float64."""
    inputs = made_inputs(case)
    cast = lambda kind: {  # noqa: E731
        name: x.astype(kind) if name not in FROM_STEP and x.dtype == jnp.float32 else x
        for name, x in inputs.items()
    }
    low = cast(jnp.bfloat16)
    exact = evaluate(
        case, jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, low)
    )
    found = evaluate(case, low)
    for leaf in jax.tree.leaves(found[0]):
        assert leaf.dtype == jnp.float32, f"{case}: {leaf.dtype} out of bfloat16, must be float32"
    assert_close(found, exact, f"{case}: bfloat16 must be cast before anything is computed")
    with jax.enable_x64(True):  # only the dtypes are looked at, so nothing is compiled
        shapes = jax.eval_shape(lambda inputs: evaluate(case, inputs)[0], cast(jnp.float64))
        for leaf in jax.tree.leaves(shapes):
            assert leaf.dtype == jnp.float64, f"{case}: {leaf.dtype} out of float64"


def check_invariances(case):
    """The two shifts change nothing exactly where the case says so."""
    inputs = made_inputs(case)
    expected, _ = evaluate(case, inputs)
    shift = np.random.default_rng(1).uniform(-0.09, 0.0, (*LEAD, case.candidates))
    if any(name.startswith("reference_") for name in inputs):
        found, _ = evaluate(case, _shifted(inputs, shift, ("policy_", "reference_")))
        _compare(case, "log_ratios", found, expected)
    found, _ = evaluate(case, _shifted(inputs, np.ones_like(shift) * shift[..., :1], ("policy_",)))
    _compare(case, "group_shift", found, expected)


def _compare(case, claim, found, expected):
    differs = _difference(found, expected) > 1e-4
    assert differs != getattr(case, claim), (
        f"{case}: the shift named {claim} {'changes' if differs else 'does not change'} the loss; "
        f"its row says {claim}={getattr(case, claim)}"
    )


def _shifted(inputs, shift, prefixes):
    """Log-probs of candidates plus `shift [..., K]`, spread over their tokens."""
    moved = dict(inputs)
    for name, x in inputs.items():
        if name.startswith(prefixes) and name.endswith("_logps"):
            by_token = np.repeat(shift[..., None], TOKENS, -1) / TOKENS
            if x.ndim == 4 and "token_mask" in inputs:
                mask = np.asarray(inputs["token_mask"])
                by_token = shift[..., None] * mask / mask.sum(-1, keepdims=True)
            moved[name] = x + jnp.asarray(shift if x.ndim == 3 else by_token, x.dtype)
    return moved


def _difference(a, b):
    """Largest difference of two results; a `Mean` counts by its value."""
    a, b = (x.value if isinstance(x, Mean) else x for x in (a, b))
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b))))


def check_compiles_once(case):
    """A second call, of other numbers and the state of the first, compiles nothing."""
    first, second = made_inputs(case), made_inputs(case, seed=1)
    state = jitted(case)(first)[0][1][1]
    carried = {"state": state} if "state" in first else {}
    evaluate(case, first)
    with compilations() as compiled:
        jax.block_until_ready(jitted(case)({**second, **carried}))
    assert not compiled.count, (
        f"{case}: under jit the second step compiles again; a state must keep its dtypes and shapes"
    )
    with compilations() as compiled:
        jax.block_until_ready(evaluate(case, second)[0])
    assert not compiled.count, f"{case}: an eager call compiles again at every call"


def check_hyper_parameters(case):
    """Every one of them changes the loss, and is explained."""
    inputs = made_inputs(case)
    if "state" in inputs:  # some of them act on what is remembered
        inputs["state"] = evaluate(case, inputs)[1]
    hints = typing.get_type_hints(case.loss, include_extras=True)
    for name, value in case.hyper_parameters.items():
        assert f"{name}:" in (case.loss.__doc__ or ""), f"{case}: {name} is not explained"
        ranges = [x for x in getattr(hints[name], "__metadata__", ()) if isinstance(x, Range)]
        number = hints[name] in (int, float)
        assert ranges or not number, f"{case}: {name} is a number without a range"
        expected = evaluate(case, inputs)
        others = (
            case.perturbed[name] if name in case.perturbed else perturbations(value, hints[name])
        )
        for other in others:
            found = evaluate(case, inputs, **{name: other})
            changed = _difference(found[0], expected[0]) > 1e-6 or any(
                np.any(np.asarray(a) != np.asarray(b))
                for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]))
            )
            assert changed, f"{case}: {name}={other!r} gives the same as {name}={value!r}"


def perturbations(value, hint):
    """Other values that the annotation of a hyper-parameter allows."""
    metadata = getattr(hint, "__metadata__", ())
    base = typing.get_args(hint)[0] if metadata else hint
    if typing.get_origin(base) is typing.Literal:
        return [other for other in typing.get_args(base) if other != value]
    if isinstance(value, bool):
        return [not value]
    assert isinstance(value, int | float), f"give {value!r} another value in `perturbed`"
    limits = [x for x in metadata if isinstance(x, Range)]
    others = [value + 1, value - 1]
    if base is not int:
        others = [1.3 * value, 0.7 * value] if value else [0.1, -0.1]
    return [x for x in others if all(limit.holds(x) for limit in limits)][:1]


def check_documented(case):
    """The docstring has a summary, an example and the paper or another source."""
    text = case.loss.__doc__ or ""
    assert SOURCE.search(text), (
        f"{case}: the docstring names no arXiv:1234.56789 and no https:// source"
    )
    assert ">>> " in text, f"{case}: the docstring has no example"
    for name in case.arrays:
        assert f"{name}:" in text, f"{case}: {name} is not explained"


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
