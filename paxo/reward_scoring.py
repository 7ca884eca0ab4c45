"""Trained models of reward and preference as the functions that judges take.

Each takes prompts with their completions, as texts, messages or token ids, packs them into rows of
one shape, so that nothing is compiled twice, and reads a head or the log-probs of the policy.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh

from paxo.data.packing import pack_groups, pad_rows
from paxo.data.records import Record
from paxo.data.row_shape import RowShape
from paxo.data.tokenise import TextTokenizer, TokenLimits, tokenise
from paxo.head_outputs import head_outputs
from paxo.losses.reward import general_preference_scores
from paxo.rows import place_rows
from paxo.scoring import all_hidden, sequence_logps
from paxo.types import Array, Params, Policy, PreferenceBatch

LOGPS = "logps"
PAIR_TEMPLATE = (
    "{prompt}\n\n[Response A]\n{a}\n\n[Response B]\n{b}\n\nThe better response is response "
)


@dataclasses.dataclass(frozen=True)
class CompletionScorer:
    """Reads a head of a policy, or its log-probs, for every completion of every prompt.

    Attributes:
        policy: has the head.
        params: its parameters, on the devices.
        tokenizer: the one it was trained with.
        shape: of the rows; a prompt with its K completions must fit in one.
        output: "scores", "embeddings", or "logps" for the summed log-prob of each completion.
        rows_per_batch: rows computed at once.
        limits: what happens to long texts; by default a text that is too long raises.
        mesh: where rows are placed; None leaves that to JAX.

    Raises:
        ValueError: for a head that the policy has not.
    """

    policy: Policy
    params: Params
    tokenizer: TextTokenizer
    shape: RowShape
    output: str = "scores"
    rows_per_batch: int = 8
    limits: TokenLimits = dataclasses.field(default_factory=TokenLimits)
    mesh: Mesh | None = None

    def __post_init__(self):
        known = [LOGPS, *(set(self.policy.heads) & {"scores", "embeddings"})]
        if self.output not in known:
            raise ValueError(
                f"output {self.output!r} is none of {', '.join(sorted(known))}, which this policy "
                "has: build it with paxo.models.heads.with_heads"
            )
        if self.rows_per_batch < 1:
            raise ValueError(f"rows_per_batch must be at least 1; got {self.rows_per_batch}")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Sequence[Any]]) -> np.ndarray:
        """`[B, K]`, or `[B, K, D]` for "embeddings", float32.

        Raises:
            DataError: for a text that cannot be tokenised or does not fit; it names the prompt.
        """
        num = len(completions[0])
        records = [
            Record(prompt, tuple(texts), (0.0,) * num, source=f"prompt {b}", index=b)
            for b, (prompt, texts) in enumerate(zip(prompts, completions))
        ]
        tokenised = tokenise(records, self.tokenizer, self.limits)
        if tokenised.dropped:
            raise ValueError(
                f"the limits leave prompts out ({tokenised.dropped}), but each needs its score: "
                "cut long ones instead"
            )
        batch, index = pack_groups(tokenised.groups, self.shape)
        found: np.ndarray | None = None
        for start in range(0, len(index), self.rows_per_batch):
            rows = slice(start, start + self.rows_per_batch)
            part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
            values, here = self._rows(part), index[rows]
            if found is None:
                found = np.zeros((len(records), num, *values.shape[3:]), values.dtype)
            found[here[here >= 0]] = values[: len(here)][here >= 0][:, :num]
        assert found is not None  # there is at least one group, as `tokenise` raises otherwise
        return found

    def _rows(self, batch: PreferenceBatch) -> np.ndarray:
        """The output for at most `rows_per_batch` rows, padded to that number."""
        batch = pad_rows(batch, self.rows_per_batch)
        if self.mesh is None:
            return np.asarray(_outputs(self.policy, self.output, self.params, batch))
        with jax.set_mesh(self.mesh):
            rows = place_rows(batch, self.mesh)
            return np.asarray(_outputs(self.policy, self.output, self.params, rows))


@dataclasses.dataclass(frozen=True)
class VerdictScorer:
    """Logits of "the first is better" and "the second is better", from one prompt that shows both.

    The two verdicts are the two completions of that prompt: for a generative judge their log-probs
    are read, for one trained with the objective `pair_preference` its head "scores".

    Attributes:
        scorer: of completions; its shape must hold the template with both texts.
        template: with {prompt}, {a} and {b}.
        verdicts: what says that A, and that B, is better.
    """

    scorer: CompletionScorer
    template: str = PAIR_TEMPLATE
    verdicts: tuple[str, str] = ("A", "B")

    def __call__(
        self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]
    ) -> np.ndarray:
        """`[N, 2]` float32 logits."""
        shown = [
            self.template.format(prompt=prompt, a=first, b=second)
            for prompt, first, second in zip(prompts, firsts, seconds)
        ]
        return self.scorer(shown, [self.verdicts] * len(shown))


@dataclasses.dataclass(frozen=True)
class HeadScorer:
    """Rewards of the candidates of packed rows: what `reward_accuracy` takes for a `Scorer`.

    Attributes:
        policy: has the head.
        params: its parameters, on the devices.
        head: "scores", or "embeddings", for which a candidate's reward is the sum of its scores
            against the others of its group.
        mesh: where batches of host arrays are placed.
    """

    policy: Policy
    params: Params
    head: str = "scores"
    mesh: Mesh | None = None

    def __call__(self, batch: PreferenceBatch) -> Array:
        """`[R, G, K]` float32, 0 where there is no candidate."""
        batch = batch.replace(fixed_logps={}, fixed_token_logps={}, fixed_hidden={}, extras={})
        if self.mesh is None:
            return _rewards(self.policy, self.head, self.params, batch)
        with jax.set_mesh(self.mesh):
            rows = place_rows(batch, self.mesh)
            return _rewards(self.policy, self.head, self.params, rows)


def save_heads(params: Params, path: str | pathlib.Path) -> None:
    """Writes the heads' parameters, which an exported model folder does not hold."""
    flat = {
        f"{name}.{part}": np.asarray(x)
        for name, head in params["heads"].items()
        for part, x in head.items()
    }
    pathlib.Path(path).write_bytes(safetensors.numpy.save(flat))


def load_heads(params: Params, path: str | pathlib.Path) -> Params:
    """The parameters with the heads of a file of `save_heads`.

    Raises:
        ValueError: if the file holds other heads than `params`, or of another size.
    """
    flat = safetensors.numpy.load_file(path)
    expected = {f"{n}.{p}": x for n, head in params["heads"].items() for p, x in head.items()}
    sizes, found = ({n: x.shape for n, x in d.items()} for d in (expected, flat))
    if sizes != found:
        raise ValueError(f"{path}: expected heads {sizes}; got {found}")
    heads = {
        name: {part: jax.device_put(flat[f"{name}.{part}"], x.sharding) for part, x in head.items()}
        for name, head in params["heads"].items()
    }
    return {**params, "heads": heads}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rewards(policy: Policy, head: str, params: Params, batch: PreferenceBatch) -> Array:
    found = _outputs(policy, head, params, batch)
    if head == "embeddings":
        both = batch.where[..., :, None] & batch.where[..., None, :]
        found = jnp.sum(jnp.where(both, general_preference_scores(found), 0.0), axis=-1)
    return jnp.where(batch.where, found, 0.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outputs(policy: Policy, output: str, params: Params, batch: PreferenceBatch) -> Array:
    if output == LOGPS:
        return sequence_logps(policy, params, batch)
    hidden = all_hidden(policy, params, batch)
    return head_outputs(policy, params, batch, [output], hidden)[output]
