"""Records to token ids: the prompt as at generation time, and completions that end in one EOS.

A completion's ids are what is left of "prompt and completion" after the prompt's ids, if the two
tokenise so; the few completions where a token would reach over the boundary are tokenised alone.
"""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from paxo.data.limits import Dropped, TokenLimits, fit
from paxo.data.records import (
    Message,
    Record,
    RecordError,
    Skipped,
    Text,
    TextError,
    TokenGroup,
    extra_axes,
    is_ids,
    plain_text,
)
from paxo.data.tokenised import TokenisedPart, TokenisedSet, joined
from paxo.data.tokenizer import TextTokenizer, load_tokenizer

__all__ = ["TextTokenizer", "TokenLimits", "load_tokenizer", "tokenise"]

BLOCK = 512  # records whose texts are encoded in one call


def tokenise(
    records: Sequence[Record],
    tokenizer: TextTokenizer,
    limits: TokenLimits | None = None,
    *,
    on_error: str = "raise",
) -> TokenisedSet:
    """Tokenises records and applies the length limits; every change is counted and logged.

    Args:
        records: from `load_records`.
        tokenizer: from `load_tokenizer`.
        limits: greatest lengths and policies; None for no limits.
        on_error: "raise" stops at the first bad record, "skip" counts and logs them.

    Raises:
        RecordError: a record cannot be tokenised or is too long, and `on_error` is "raise".
        DataError: no record is left.
    """
    limits = limits or TokenLimits()
    return joined([tokenise_part(records, tokenizer, limits, on_error=on_error)], limits)


def tokenise_part(
    records: Sequence[Record], tokenizer: TextTokenizer, limits: TokenLimits, *, on_error: str
) -> TokenisedPart:
    """Tokenises a part of a set, as `tokenise` does the whole.

    Raises:
        RecordError: a record cannot be tokenised or is too long, and `on_error` is "raise".
    """
    skipped = Skipped(on_error)
    counts: collections.Counter = collections.Counter()
    dropped: dict[str, list[str]] = {}
    groups: list[TokenGroup] = []
    for start in range(0, len(records), BLOCK):
        drafts = _drafts(records[start : start + BLOCK], start, tokenizer, skipped)
        prompts = tokenizer.encode([draft.prompt for draft in drafts])
        full = iter(tokenizer.encode([text for draft in drafts for text in draft.full]))
        texts = [t for draft in drafts if draft.record.contexts for t in draft.before]
        before = iter(tokenizer.encode(texts))
        for draft, prompt in zip(drafts, prompts):
            joint = [next(full) for _ in draft.full]
            starts = [next(before) if draft.record.contexts else prompt for _ in draft.full]
            with skipped, _placed(draft.record):
                group = _group(draft, prompt, starts, joint, tokenizer)
                _check(group, limits.vocab_size or tokenizer.vocab_size)
                try:
                    groups.append(fit(group, limits, bos_id=tokenizer.bos_id))
                except Dropped as reason:
                    dropped.setdefault(str(reason), []).append(group.source)
                    continue
                counts.update(draft.notes, **_cuts(group, groups[-1]))
    return TokenisedPart(groups, len(records), counts, dropped, skipped)


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A record as text.

    `before[k]` is `prompt` and the context of completion k, and begins `full[k]`, which holds the
    completion `texts[k]`.
    """

    record: Record
    index: int
    prompt: str
    before: tuple[str, ...]
    texts: tuple[str, ...]
    full: tuple[str, ...]
    notes: collections.Counter


def _drafts(
    records: Sequence[Record], start: int, tokenizer: TextTokenizer, skipped: Skipped
) -> list[_Draft]:
    drafts = []
    for position, record in enumerate(records, start=start):
        with skipped, _placed(record):
            notes = collections.Counter()
            prompt = tokenizer.prompt_text(record.prompt)
            completions = () if is_ids(record.prompt) else record.completions
            texts = tuple(
                _clean(record, k, text, tokenizer, notes) for k, text in enumerate(completions)
            )
            contexts = record.contexts or ("",) * len(texts)
            before = tuple(prompt + context for _, context in zip(texts, contexts))
            full = tuple(
                _full_text(record, start, context, text, tokenizer)
                for start, context, text in zip(before, contexts, texts)
            )
            index = position if record.index is None else record.index
            drafts.append(_Draft(record, index, prompt, before, texts, full, notes))
    return drafts


def _clean(
    record: Record, k: int, text: Text, tokenizer: TextTokenizer, notes: collections.Counter
) -> str:
    """The completion's own text, without an EOS that the data set has written out."""
    written = plain_text(text)
    text = tokenizer.final_eos.sub("", written)
    notes["eos_text_removed"] += text != written
    if not text.strip():
        raise _error(record, k, "some text", repr(written), "empty completion")
    return text


def _full_text(
    record: Record, before: str, context: str, text: str, tokenizer: TextTokenizer
) -> str:
    """The text of prompt, context and completion."""
    if isinstance(record.prompt, str):
        return before + text
    full = tokenizer.render((*record.prompt, Message("assistant", context + text)), generate=False)
    if not full.startswith(before):
        raise TextError(
            expected="a chat template that renders the prompt alike with and without its reply",
            got=f"{before[-40:]!r} against {full[: len(before)][-40:]!r}",
            way_out="pass another chat_template, or render the prompts to strings first",
            reason="chat template is not prefix-preserving",
        )
    return full


def _group(
    draft: _Draft,
    prompt: list[int],
    starts: list[list[int]],
    joint: list[list[int]],
    tokenizer: TextTokenizer,
) -> TokenGroup:
    """The group of a record from the ids of its texts; no limits yet."""
    record = draft.record
    if is_ids(record.prompt):
        prompt, completions = list(record.prompt), [list(ids) for ids in record.completions]
        contexts = record.contexts
    else:
        completions = [
            _completion(draft, k, start, ids, tokenizer)
            for k, (start, ids) in enumerate(zip(starts, joint))
        ]
        contexts = [
            start[len(prompt) :]
            if start[: len(prompt)] == prompt
            else tokenizer.encode_continuation(context)
            for start, context in zip(starts, record.contexts)
        ]
        if record.prompt != "":
            prompt = tokenizer.finish_prompt(record.prompt, prompt)
        elif tokenizer.bos_id is not None:
            prompt = [tokenizer.bos_id]
        else:
            # Nothing predicts the first token of a text: the others are conditioned on it.
            prompt, completions = completions[0][:1], [completions[0][1:]]
            draft.notes["first_token_unscored"] += 1
    return TokenGroup(
        prompt=np.array(prompt, np.int32),
        completions=tuple(np.array(ids, np.int32) for ids in completions),
        finished=tuple(ids[-1] in tokenizer.stop_ids for ids in completions),
        labels=record.labels,
        extras=record.extras,
        index=draft.index,
        source=record.source,
        contexts=tuple(np.array(ids, np.int32) for ids in contexts),
    )


def _completion(
    draft: _Draft, k: int, prompt: list[int], joint: list[int], tokenizer: TextTokenizer
) -> list[int]:
    """Ids of the k-th completion, with one stop token, which is the last."""
    record, text = draft.record, draft.full[k][len(draft.before[k]) :]
    reserved = {*tokenizer.stop_ids, tokenizer.bos_id}
    inside = ("no BOS or stop token before the end", repr(text[:60]), "stop token in a completion")
    ids = joint[len(prompt) :]
    escape = tokenizer.special_text.search(draft.texts[k])
    if escape or joint[: len(prompt)] != prompt:
        draft.notes["boundary_retokenised"] += 1
        parts = _split(text, draft.texts[k]) if escape else [(text, True)]
        encoded = [tokenizer.encode_continuation(t, special=special) for t, special in parts]
        if escape and not reserved.isdisjoint(encoded[1]):
            raise _error(record, k, *inside)
        ids = list(itertools.chain.from_iterable(encoded))
    if not isinstance(record.prompt, str):
        # What a template writes after the end of a turn is not the assistant's to write.
        stops = [i for i, token in enumerate(ids) if token in tokenizer.stop_ids]
        ids = ids[: stops[0] + 1] if stops else ids
    if not ids or ids[-1] not in tokenizer.stop_ids:
        ids = [*ids, tokenizer.eos_id]
    if len(ids) < 2:
        got = f"none for {text[:40]!r}"
        raise _error(record, k, "a token besides EOS", got, "empty completion")
    if not reserved.isdisjoint(ids[:-1]):
        raise _error(record, k, *inside)
    return ids


def _split(text: str, content: str) -> list[tuple[str, bool]]:
    """Parts of a rendered completion, and whether each may hold special tokens.

    Only the template writes special tokens; in the text of the data they are mere characters.
    """
    before, content, after = text.partition(content if content in text else content.strip())
    words = before.rstrip()
    return [(words, True), (before[len(words) :] + content, False), (after, True)]


def _check(group: TokenGroup, vocab_size: int) -> None:
    parts = {"prompt": group.prompt}
    parts |= {_field(group, k): ids for k, ids in enumerate(group.completions)}
    parts |= {f"contexts[{k}]": ids for k, ids in enumerate(group.contexts) if len(ids)}
    for field, ids in parts.items():
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise RecordError(
                group.source,
                field,
                expected=f"token ids from 0 to {vocab_size - 1}",
                got=str(ids.max() if ids.min() >= 0 else ids.min()),
                way_out="use the tokenizer that belongs to the model",
                reason="token outside the vocabulary",
            )
    for name, value in group.extras.items():
        column, axes = extra_axes(name, value)
        for k, numbers in enumerate(value if axes == "KT" else ()):
            if len(numbers) != len(group.completions[k]):
                raise RecordError(
                    group.source,
                    f"{column}[{k}]",
                    expected=f"{len(group.completions[k])} numbers, one for each scored token of "
                    "the completion with its EOS",
                    got=f"{len(numbers)}",
                    way_out="make them with this tokenizer, or give token ids (prompt_ids, ...)",
                    reason=f"{column} and tokens differ in number",
                )
    if group.is_pair and np.array_equal(*group.completions):
        reason = "chosen equals rejected"
        raise _error(group, 1, "other tokens than those of 'chosen'", "the same tokens", reason)


def _cuts(group: TokenGroup, fitted: TokenGroup) -> dict[str, int]:
    lengths = zip(map(len, fitted.completions), map(len, group.completions))
    return {
        "completions": len(group.completions),
        "prompts_cut": int(len(fitted.prompt) < len(group.prompt)),
        "completions_cut": sum(after < before for after, before in lengths),
    }


@contextlib.contextmanager
def _placed(record: Record) -> Iterator[None]:
    try:
        yield
    except TextError as error:
        raise error.at(record.source, "prompt") from error


def _field(record: Record | TokenGroup, k: int) -> str:
    return ("chosen", "rejected")[k] if record.labels == (1.0, 0.0) else f"completions[{k}]"


def _error(
    record: Record | TokenGroup, k: int, expected: str, got: str, reason: str
) -> RecordError:
    way_out = 'correct the text, or leave such records out with on_error="skip"'
    field = _field(record, k)
    return RecordError(
        record.source, field, expected=expected, got=got, way_out=way_out, reason=reason
    )
