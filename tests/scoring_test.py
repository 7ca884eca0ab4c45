"""Log-probs of packed rows: each sequence as if alone, on any mesh, and the same from disk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.data.packing import choose_shape, pack_groups, sequence_tokens
from paxo.logp_store import LogpStore
from paxo.models.sharding import make_mesh, param_shardings
from paxo.scoring import (
    StoredScorer,
    attach_logps,
    by_candidate,
    make_scorer,
    params_fingerprint,
    sequence_logps,
    slot_lengths,
    slot_sums,
    token_logps,
    token_scores,
)
from tests.compiling import compilations, quick_compiles  # noqa: F401
from tests.made import made_batch, made_groups, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_compiles")


def small_policy(seed=0, **changes):
    return tiny_policy(seed, num_layers=1, **changes)


def ragged_batch(**changes):
    """Groups of 1 to 3 candidates in 6 rows, of which some are padding."""
    settings = {"rows": 6, "candidates": 3, "ragged": True, "length": 40, "longest": 5} | changes
    return made_batch(8, **settings)


def dense_logits(policy, params, tokens):
    """`[L, V]` of one sequence without padding or neighbours."""
    tokens = jnp.asarray(tokens)[None]
    ones = jnp.ones_like(tokens)
    hidden = policy.trunk(params, tokens, jnp.arange(tokens.shape[1])[None], ones, ones - 1)
    return policy.head(params, hidden)[0]


def alone(policy, params, batch):
    """`[R, G, K]` summed log-probs of each sequence run alone, padded on the right."""
    found = list(sequence_tokens(batch))
    longest = max(len(prompt) + len(completion) for *_, prompt, completion in found)
    padded = np.zeros((len(found), longest), np.int32)
    starts, ends = np.zeros((2, len(found)), np.int32)
    for i, (*_, prompt, completion) in enumerate(found):
        starts[i], ends[i] = len(prompt), len(prompt) + len(completion)
        padded[i, : ends[i]] = np.concatenate([prompt, completion])
    logits = jax.vmap(lambda row: dense_logits(policy, params, row))(padded)
    log_p = jax.nn.log_softmax(logits[:, :-1])
    taken = jnp.take_along_axis(log_p, padded[:, 1:, None], -1)[..., 0]
    at = np.arange(1, longest)
    scored = (at >= starts[:, None]) & (at < ends[:, None])
    places = tuple(np.array([place[:3] for place in found]).T)
    return jnp.zeros(batch.where.shape).at[places].set(jnp.sum(jnp.where(scored, taken, 0), -1))


def assert_near(found, wanted, part=1e-5):
    """Two trees, to a part of the largest entry of all."""
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=part * largest)


@pytest.mark.parametrize("tied", [True, False])
def test_packed_log_probs_and_gradients_are_those_of_each_sequence_alone(tied):
    policy, params = small_policy(tie_embeddings=tied)
    batch = ragged_batch()
    weights = np.random.default_rng(2).standard_normal(batch.where.shape)

    def run(score):
        def total(params):
            logps = score(policy, params, batch)
            return jnp.sum(weights * logps), logps

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    ((_, packed), to_packed), ((_, single), to_single) = run(sequence_logps), run(alone)
    assert (np.asarray(packed)[~batch.where] == 0).all()
    assert_near(packed, single)
    assert_near(to_packed, to_single)
    # Both uses of a tied embedding count: through the head every row of it has a gradient, through
    # the look-up only those of tokens that occur.
    unseen = np.setdiff1d(np.arange(40), np.unique(batch.tokens))
    to_embedding = np.abs(to_packed["embed"]["embedding"]).max(-1)
    assert unseen.size
    assert (to_embedding[unseen] > 0).all() == tied


def test_rows_of_padding_have_log_probs_of_0_and_no_gradient():
    policy, params = small_policy()
    batch = ragged_batch()
    empty = ~batch.where.any((1, 2))
    assert empty.any()
    logps = token_logps(policy, params, batch)
    no_slot = batch.where[0].size
    np.testing.assert_array_equal(np.asarray(logps)[batch.score_slot == no_slot], 0)
    part = jax.tree.map(lambda x: x[empty], batch)
    gradient = jax.grad(lambda p: jnp.sum(sequence_logps(policy, p, part)))(params)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(gradient))


def test_chunk_of_the_head_changes_nothing():
    policy, params = small_policy()
    batch, names = ragged_batch(), ("logps", "entropies", "collisions")
    whole = token_scores(policy, params, batch, names, chunk=1000)
    for chunk in (1, 7):
        assert_near(token_scores(policy, params, batch, names, chunk=chunk), whole, part=1e-6)


def test_kls_to_the_policy_itself_are_0_and_to_another_positive():
    policy, params = small_policy()
    batch = ragged_batch()
    same = attach_logps(batch, "reference", make_scorer(policy, params), hidden=True)
    other_policy, other = small_policy(7)
    another = attach_logps(batch, "reference", make_scorer(other_policy, other), hidden=True)
    kls = lambda given, of: token_scores(  # noqa: E731
        policy, params, given, ("kls",), reference_head=policy.unembed(of)
    )["kls"]
    scored = batch.score_slot < batch.where[0].size
    np.testing.assert_allclose(kls(same, params), 0, atol=1e-5)
    assert (np.asarray(kls(another, other))[scored] > 1e-3).all()


def test_unknown_quantities_and_missing_references_are_refused():
    policy, params = small_policy()
    with pytest.raises(ValueError, match=r"unknown quantities \['perplexity'\]; known: logps"):
        token_scores(policy, params, ragged_batch(), ("perplexity",))
    with pytest.raises(ValueError, match=r"needs the reference's hidden.*attach_logps"):
        token_scores(policy, params, ragged_batch(), ("kls",))


def test_lengths_sums_and_token_arrays_are_those_of_the_sequences():
    batch = ragged_batch()
    values = np.random.default_rng(1).standard_normal(batch.score_slot.shape).astype(np.float32)
    values[batch.score_slot == batch.where[0].size] = np.nan  # padding reaches nothing
    lengths, sums = slot_lengths(batch), slot_sums(values, batch)
    laid_out = by_candidate(values, batch)
    assert laid_out.shape == (*batch.where.shape, batch.max_completion)
    assert lengths.dtype == jnp.float32
    taken = np.zeros(len(values), int)
    wanted = {"lengths": np.zeros(batch.where.shape), "laid_out": np.zeros(laid_out.shape)}
    for row, g, k, _, completion in sequence_tokens(batch):
        own = values[row, taken[row] : taken[row] + len(completion)]
        taken[row] += len(completion)
        wanted["lengths"][row, g, k] = len(completion)
        wanted["laid_out"][row, g, k, : len(completion)] = own
    np.testing.assert_array_equal(lengths, wanted["lengths"])
    np.testing.assert_array_equal(laid_out, wanted["laid_out"])
    np.testing.assert_allclose(sums, wanted["laid_out"].sum(-1), rtol=1e-5, atol=1e-6)
    tokens = by_candidate(batch.score_token, batch)
    for row, g, k, _, completion in sequence_tokens(batch):
        assert tokens[row, g, k, : len(completion)].tolist() == completion.tolist()


def test_sums_of_low_precision_values_are_taken_in_float32():
    batch = ragged_batch()
    ones = jnp.full(batch.score_slot.shape, 1.0 + 1 / 128, jnp.bfloat16)
    sums = slot_sums(ones, batch)
    assert sums.dtype == jnp.float32
    np.testing.assert_array_equal(sums, slot_lengths(batch) * (1 + 1 / 128))


def test_scorer_on_a_mesh_gives_what_one_device_gives():
    policy, params = small_policy()
    batch = ragged_batch(rows=8)
    mesh = make_mesh(2, 2, 2)
    placed = jax.device_put(params, param_shardings(policy.logical_axes, params, mesh))
    one, many = make_scorer(policy, params), make_scorer(policy, placed, mesh=mesh)
    assert_near(many(batch), one(batch))
    assert_near(many.token_logps(batch), one.token_logps(batch))
    assert_near(np.asarray(many.hidden(batch)), one.hidden(batch))
    assert many.fingerprint() == one.fingerprint()


def test_attached_arrays_lie_under_their_role_beside_others():
    policy, params = small_policy()
    scorer = make_scorer(policy, params)
    batch = attach_logps(ragged_batch(), "previous", scorer)
    batch = attach_logps(batch, "reference", scorer, tokens=True, hidden=True)
    assert set(batch.fixed_logps) == {"previous", "reference"}
    assert set(batch.fixed_token_logps) == set(batch.fixed_hidden) == {"reference"}
    assert_near(
        slot_sums(batch.fixed_token_logps["reference"], batch), batch.fixed_logps["previous"]
    )


def test_fingerprint_changes_with_any_bit_name_dtype_or_shape():
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(3, dtype=jnp.bfloat16)}
    changed = {"nothing": params}
    for bit in (0, 13, 31):
        for at in (0, 5):
            bits = np.asarray(params["a"]).copy().view(np.uint32)
            bits.reshape(-1)[at] ^= np.uint32(1 << bit)
            changed[f"bit {bit} at {at}"] = params | {"a": jnp.asarray(bits.view(np.float32))}
    changed["two swapped"] = params | {"a": params["a"][:, jnp.array([1, 0, 2])]}
    changed["minus zero"] = params | {"b": params["b"].at[0].set(-0.0)}
    changed["name"] = {"a": params["a"], "c": params["b"]}
    changed["dtype"] = params | {"b": params["b"].astype(jnp.float16)}
    changed["shape"] = params | {"a": params["a"].reshape(3, 2)}
    assert len({params_fingerprint(x) for x in changed.values()}) == len(changed)


def test_fingerprint_sees_all_64_bits():
    with jax.enable_x64(True):
        bits = np.array([1.0, 2.0]).view(np.uint64)
        same = params_fingerprint({"w": jnp.asarray(bits.view(np.float64))})
        for bit in (0, 31, 32, 63):
            other = bits ^ np.array([1 << bit, 0], np.uint64)
            assert params_fingerprint({"w": jnp.asarray(other.view(np.float64))}) != same


def test_fingerprint_is_equal_across_shardings():
    policy, params = small_policy()
    expected = params_fingerprint(params)
    for sizes in ((8, 1, 1), (1, 4, 2), (2, 2, 2)):
        shardings = param_shardings(policy.logical_axes, params, make_mesh(*sizes))
        assert params_fingerprint(jax.device_put(params, shardings)) == expected


class Counting:
    """A scorer that counts its forward passes."""

    mesh = None

    def __init__(self, scorer):
        self.scorer, self.calls = scorer, 0

    def __call__(self, batch):
        self.calls += 1
        return self.scorer(batch)

    def token_logps(self, batch):
        self.calls += 1
        return self.scorer.token_logps(batch)


@pytest.fixture
def counting():
    return Counting(make_scorer(*small_policy()))


@pytest.mark.parametrize("kind", ["logps", "token_logps"])
def test_second_pass_reads_the_same_bits_without_a_forward(tmp_path, counting, kind):
    batch = ragged_batch()

    def run(batch, fingerprint="one"):
        with LogpStore(tmp_path, fingerprint) as store:
            scorer = StoredScorer(counting, store)
            return scorer(batch) if kind == "logps" else scorer.token_logps(batch)

    first = run(batch)
    computed = counting.scorer(batch) if kind == "logps" else counting.scorer.token_logps(batch)
    np.testing.assert_array_equal(first, computed)
    np.testing.assert_array_equal(run(batch), first)
    assert counting.calls == 1
    # The same sequences in other rows are found again; each gets its own value.
    turned = jax.tree.map(lambda x: x[::-1], batch)
    np.testing.assert_array_equal(run(turned), first[::-1])
    assert counting.calls == 1
    run(batch, fingerprint="another policy")
    assert counting.calls == 2


def test_a_batch_with_one_new_sequence_is_scored_once_and_keeps_what_was_stored(tmp_path, counting):
    batch, more = ragged_batch(), ragged_batch(seed=5, rows=6)
    with LogpStore(tmp_path, "one") as store:
        scorer = StoredScorer(counting, store)
        first = scorer(batch)
        counting.scorer = make_scorer(*small_policy(9))  # other numbers, were they looked at
        np.testing.assert_array_equal(scorer(batch), first)
        scorer(more)
        assert counting.calls == 2


@pytest.mark.parametrize("kind", ["logps", "token_logps"])
def test_sequence_twice_in_a_batch_has_the_value_that_is_stored(tmp_path, kind):
    """Rows differ in their last bits: a resumed run must see what the first one saw."""
    one = ragged_batch()
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), one)

    class Drifting(Counting):
        def drifted(self, values):
            drift = np.float32(1 + 1e-6 * np.arange(len(values)))
            return np.asarray(values) * drift.reshape(-1, *(1,) * (values.ndim - 1))

        def __call__(self, batch):
            return self.drifted(self.scorer(batch))

        def token_logps(self, batch):
            return self.drifted(self.scorer.token_logps(batch))

    scorer = Drifting(make_scorer(*small_policy()))
    with LogpStore(tmp_path, "one") as store:
        stored = StoredScorer(scorer, store)
        run = stored if kind == "logps" else stored.token_logps
        first, second = run(batch), run(batch)
    np.testing.assert_array_equal(first, second)


def test_batch_fields_that_do_not_matter_do_not_compile_again():
    policy, params = small_policy()
    scorer, batch = make_scorer(policy, params), ragged_batch()
    scorer(batch)
    with compilations() as compiled:
        scorer(attach_logps(batch, "reference", scorer))
        scorer(dataclasses.replace(batch, extras={"rewards": batch.labels}))
    assert not compiled.count


def test_a_context_is_read_and_not_scored():
    policy, params = small_policy()
    rng = np.random.default_rng(1)
    groups = [
        dataclasses.replace(
            group, contexts=tuple(rng.integers(3, 40, n).astype(np.int32) for n in (0, 3))
        )
        for group in made_groups(5, longest=5)
    ]
    batch, _ = pack_groups(groups, choose_shape(groups, row_length=48))
    found = sequence_logps(policy, params, batch)
    np.testing.assert_allclose(found, alone(policy, params, batch), rtol=1e-5, atol=1e-5)
    lengths = np.asarray(slot_lengths(batch))[batch.where]
    assert lengths.sum() == sum(len(c) for group in groups for c in group.completions)
