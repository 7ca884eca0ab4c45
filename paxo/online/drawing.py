"""Drawing candidates: prompts of any lengths in few shapes, answers as host arrays."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from paxo.online.groups import Prompt
from paxo.online.method import Draw
from paxo.rows import RowShare, from_all, row_share
from paxo.sampling import SamplingConfig, make_mixture_sampler, make_sampler
from paxo.types import Array, Params, Policy, PromptBatch

PROMPT_MULTIPLE = 16  # widths of prompts are multiples of it: each width compiles a sampler
GROWTH = 1.25  # from one padded size to the next: what is wasted stays below, shapes are few


class Drawn(NamedTuple):
    """Completions of B prompts, K each.

    Attributes:
        tokens: B lists of K arrays `[T_k]` int32, the stop token included.
        finished: `[B, K]` bool.
        logps: `[B, K]` float32, log-prob of each completion under the policy that drew it (without
            temperature or truncation), nats.
    """

    tokens: list[list[np.ndarray]]
    finished: np.ndarray
    logps: np.ndarray


class Drawer:
    """Draws from the policies of a round; several processes share the prompts, and tell all.

    The draws for a prompt depend on the key, its number, the candidate and the position alone.

    Args:
        policy: the model of all policies.
        config: how completions are drawn, where a `Draw` does not say otherwise.
        stop_ids: tokens that end a completion.
        mesh: devices over which prompts are spread.
        batch_size: prompts drawn for at a time.
        reference: the reference's model, where it is another.

    Raises:
        ValueError: for a batch of no prompts, or what the samplers refuse.
    """

    def __init__(
        self,
        policy: Policy,
        config: SamplingConfig,
        stop_ids: tuple[int, ...],
        *,
        mesh: Mesh | None = None,
        batch_size: int = 64,
        reference: Policy | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        self.policy, self.reference = policy, policy if reference is None else reference
        self.config, self.stop_ids, self.mesh = config, tuple(stop_ids), mesh
        self.batch_size = batch_size

    @property
    def max_prompt(self) -> int | None:
        """Most tokens of a prompt that leaves room for a completion; None without a limit."""
        limits = [p.max_positions for p in (self.policy, self.reference) if p.max_positions]
        return min(limits) - self.config.max_new_tokens if limits else None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for a prompt that leaves no room for a completion.

        Args:
            prompts: all that will be drawn for.
        """
        limit = self.max_prompt
        for prompt in prompts:
            if limit is not None and len(prompt.ids) > limit:
                raise ValueError(
                    f"prompt {prompt.index} has {len(prompt.ids)} tokens; with "
                    f"max_new_tokens={self.config.max_new_tokens} that exceeds the model's "
                    f"{limit + self.config.max_new_tokens} positions: lower it, or leave out "
                    "longer prompts"
                )

    def __call__(
        self,
        draw: Draw,
        policies: Mapping[str, Params],
        prompts: Sequence[Prompt],
        key: Array,
        *,
        mix: float = 0.0,
    ) -> Drawn:
        """`draw.count` completions of each prompt.

        Args:
            draw: from which policy, and how.
            policies: source -> parameters: "policy", "reference", "average".
            prompts: one list of them is one round's.
            key: random key.
            mix: weight of the reference, for `source="mixture"`.

        Raises:
            ValueError: as `check`.
        """
        self.check(prompts)
        sampler = self._sampler(draw, policies, mix)
        share = RowShare(0, 1) if self.mesh is None else row_share(self.mesh)
        own = list(prompts[share.index :: share.count])
        own += [prompts[-1]] * (-(-len(prompts) // share.count) - len(own))  # as many as others
        parts = []
        for start in range(0, len(own), self.batch_size):
            some = own[start : start + self.batch_size]
            drawn = jax.device_get(sampler(self._batch(some), key))
            found = (
                drawn.tokens.astype(np.int32),
                drawn.mask.sum(-1),
                drawn.finished,
                np.sum(drawn.token_logps["policy"], -1, dtype=np.float32),
            )
            parts.append([np.asarray(x[: len(some)]) for x in found])
        whole = [np.concatenate(x) for x in zip(*parts)]
        if share.count > 1:
            whole = from_all(whole, self.mesh)
            # The i-th prompt of share s is the (i * count + s)-th of all.
            order = np.arange(len(own) * share.count).reshape(share.count, -1).T.ravel()
            whole = [x[order[: len(prompts)]] for x in whole]
        tokens, lengths, finished, logps = whole
        cut = [[t[:n] for t, n in zip(*row)] for row in zip(tokens, lengths)]
        return Drawn(cut, finished, logps)

    def _sampler(self, draw: Draw, policies: Mapping[str, Params], mix: float) -> Any:
        config = sampling_config(self.config, draw)
        if draw.source == "mixture":
            sampler = make_mixture_sampler(
                self.policy, config, self.stop_ids, reference=self.reference, mesh=self.mesh
            )
            return lambda batch, key: sampler(
                policies["policy"], batch, key, reference_params=policies["reference"], mix=mix
            )
        model = self.reference if draw.source == "reference" else self.policy
        sampler = make_sampler(model, config, self.stop_ids, mesh=self.mesh)
        return lambda batch, key: sampler(policies[draw.source], batch, key)

    def _batch(self, prompts: Sequence[Prompt]) -> PromptBatch:
        """Right-padded, the last prompt repeated up to the size of a batch."""
        filled = [*prompts, *[prompts[-1]] * (self.batch_size - len(prompts))]
        longest = max(len(p.ids) for p in filled)
        tokens = np.zeros((len(filled), padded_size(longest, PROMPT_MULTIPLE)), np.int32)
        for row, prompt in zip(tokens, filled):
            row[: len(prompt.ids)] = prompt.ids
        if self.max_prompt is not None:  # the padding must not be what is too long
            tokens = tokens[:, : max(self.max_prompt, 1)]
        return PromptBatch(
            tokens,
            np.array([len(p.ids) for p in filled], np.int32),
            np.array([p.index for p in filled], np.int32),
        )


def sampling_config(config: SamplingConfig, draw: Draw) -> SamplingConfig:
    """A run's settings of sampling as a draw has them.

    >>> sampling_config(SamplingConfig(64, top_p=0.9), Draw("policy", 4, temperature=0.7)).top_p
    0.9
    """
    own = {name: getattr(draw, name) for name in ("temperature", "top_k", "top_p")}
    changes = {name: value for name, value in own.items() if value is not None}
    return dataclasses.replace(config, num_candidates=draw.count, **changes)


def padded_size(needed: int, multiple: int) -> int:
    """The next of few sizes, each at most a quarter (or one multiple) above the one before.

    >>> [padded_size(n, 16) for n in (1, 16, 17, 100, 130)]
    [16, 16, 32, 112, 160]
    """
    size = multiple
    while size < needed:
        size = max(int(size * GROWTH) // multiple * multiple, size + multiple)
    return size
