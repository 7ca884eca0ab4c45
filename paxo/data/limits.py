"""What happens to records that are too long: an explicit policy for each part of them."""

import dataclasses

import numpy as np

from paxo.data.records import RecordError, TokenGroup, check_choice, extra_axes

POLICIES = {
    "long_prompt": ("error", "drop", "keep_end"),
    "long_completion": ("error", "drop", "cut"),
    "long_group": ("error", "drop"),
}


@dataclasses.dataclass(frozen=True)
class TokenLimits:
    """Greatest lengths in tokens, and what is done about longer records.

    A sequence over `max_sequence` loses the start of its prompt first (`keep_end`), but never more
    than leaves half of `max_sequence` to the prompt, and then the end of its completions (`cut`).

    Attributes:
        max_prompt: of the prompt.
        max_completion: of each completion, EOS included.
        max_sequence: of prompt and completion together: the model's positions.
        max_group: of the prompt and all its completions: the length of a row.
        vocab_size: ids that the model has, if fewer than the tokenizer's.
        long_prompt: "error", "drop" the record, or "keep_end" of the prompt after its BOS.
        long_completion: "error", "drop" the record, or "cut" the completion, which then has no EOS.
        long_group: "error" or "drop" the record.

    >>> TokenLimits(max_prompt=384, long_prompt="keepend")
    Traceback (most recent call last):
    ValueError: long_prompt='keepend' is not one of 'error', 'drop', 'keep_end'; did you mean
    'keep_end'?
    """

    max_prompt: int | None = None
    max_completion: int | None = None
    max_sequence: int | None = None
    max_group: int | None = None
    vocab_size: int | None = None
    long_prompt: str = "error"
    long_completion: str = "error"
    long_group: str = "error"

    def __post_init__(self):
        for name, choices in POLICIES.items():
            check_choice(name, getattr(self, name), choices)
        for name in ("max_prompt", "max_completion", "max_sequence", "max_group", "vocab_size"):
            value = getattr(self, name)
            # BOS and one token of the prompt must fit, and a token that is scored.
            least = 1 if name == "max_completion" else 2
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is too small; give at least {least}, or None")


class Dropped(Exception):
    """The policy drops this record; the text says why and can be counted."""


def fit(group: TokenGroup, limits: TokenLimits, *, bos_id: int | None = None) -> TokenGroup:
    """The group within its limits: the same one if nothing is too long.

    Raises:
        RecordError: it is too long under the policy "error".
        Dropped: it is too long under the policy "drop", or cutting has made the two completions of
            a pair equal.
    """
    if limits.max_prompt is not None and len(group.prompt) > limits.max_prompt:
        group = _shorten_prompt(group, limits, limits.max_prompt, "max_prompt", bos_id)
    if limits.max_completion is not None and _longest(group) > limits.max_completion:
        group = _cut_completions(group, limits, limits.max_completion, "max_completion")
    if limits.max_sequence is not None:
        group = _fit_sequence(group, limits, bos_id)
    if limits.max_group is not None and group.num_tokens > limits.max_group:
        raise _refusal(group, limits, "long_group", "max_group", group.num_tokens)
    if group.is_pair and not all(group.finished) and np.array_equal(*group.completions):
        raise Dropped("chosen equals rejected once cut")
    return group


def keep_end(prompt: np.ndarray, length: int, *, bos_id: int | None = None) -> np.ndarray:
    """The last `length` tokens of a prompt; a BOS in front stays and counts.

    >>> keep_end(np.array([1, 5, 6, 7, 8]), 3, bos_id=1)
    array([1, 7, 8])
    """
    if len(prompt) <= length:
        return prompt
    if bos_id is not None and prompt[0] == bos_id and length > 1:
        return np.concatenate([prompt[:1], prompt[-(length - 1) :]])
    return prompt[-length:]


def _fit_sequence(group: TokenGroup, limits: TokenLimits, bos_id: int | None) -> TokenGroup:
    longest = _longest(group)
    if len(group.prompt) + longest <= limits.max_sequence:
        return group
    if limits.long_prompt == "keep_end":
        room = max(limits.max_sequence - longest, limits.max_sequence // 2)
        if len(group.prompt) > room:
            group = _shorten_prompt(group, limits, room, "max_sequence", bos_id)
    room = limits.max_sequence - len(group.prompt)
    if longest <= room:
        return group
    if limits.long_completion == "cut" and room > 0:
        return _cut_completions(group, limits, room, "max_sequence")
    policy = "long_completion" if room > 0 else "long_prompt"
    # Which of the two is too long is a matter of view: either policy "drop" lets the record go.
    if limits.long_prompt == "drop":
        policy = "long_prompt"
    raise _refusal(group, limits, policy, "max_sequence", len(group.prompt) + longest)


def _shorten_prompt(
    group: TokenGroup, limits: TokenLimits, length: int, limit: str, bos_id: int | None
) -> TokenGroup:
    if limits.long_prompt != "keep_end":
        raise _refusal(group, limits, "long_prompt", limit, len(group.prompt))
    return dataclasses.replace(group, prompt=keep_end(group.prompt, length, bos_id=bos_id))


def _cut_completions(group: TokenGroup, limits: TokenLimits, length: int, limit: str) -> TokenGroup:
    if limits.long_completion != "cut":
        raise _refusal(group, limits, "long_completion", limit, _longest(group))
    return dataclasses.replace(
        group,
        completions=tuple(completion[:length] for completion in group.completions),
        finished=tuple(
            done and len(completion) <= length
            for done, completion in zip(group.finished, group.completions)
        ),
        extras={
            name: tuple(numbers[:length] for numbers in value)
            if extra_axes(name, value)[1] == "KT"
            else value
            for name, value in group.extras.items()
        },
    )


def _refusal(
    group: TokenGroup, limits: TokenLimits, policy: str, limit: str, length: int
) -> Exception:
    """What is raised for a group whose part is `length` tokens long, over the named limit."""
    part = {"max_sequence": "prompt and completion", "max_group": "prompt and all completions"}.get(
        limit, limit.removeprefix("max_")
    )
    allowed = getattr(limits, limit)
    reason = f"{part} longer than {allowed} tokens"
    if getattr(limits, policy) == "drop":
        return Dropped(reason)
    others = [repr(choice) for choice in POLICIES[policy] if choice != "error"]
    return RecordError(
        group.source,
        part,
        expected=f"at most {allowed} tokens ({limit})",
        got=str(length),
        way_out=f"raise {limit} or set {policy} to {' or '.join(others)}",
        reason=reason,
    )


def _longest(group: TokenGroup) -> int:
    return max(len(completion) for completion in group.completions)


def _is_pair(group: TokenGroup) -> bool:
    return len(group.labels) == 2 and group.labels[0] != group.labels[1]
