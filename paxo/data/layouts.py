"""From a row's columns to a `Record`: one reader for each layout that preference data comes in.

Columns that no layout names are provenance and are ignored. A column that is null counts as absent.
"""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paxo.data.records import (
    ROLES,
    Extra,
    Message,
    Record,
    RecordError,
    Text,
    is_ids,
    plain_text,
)

OPTIONAL_EXTRAS = ("margin", "score_chosen", "score_rejected")
# These change what the prompt is: ignoring them would quietly train on another task.
UNSUPPORTED = ("tools", "images", "chat_template_kwargs")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
FIX_ROW = 'correct the row, or count and leave out such rows with on_error="skip"'


def parse_record(
    row: Mapping[str, Any], source: str, *, extras: Sequence[str] = (), index: int | None = None
) -> Record:
    """The record in a row, whose layout is recognised by the names of its columns.

    | columns | record |
    |---|---|
    | `prompt`, `chosen`, `rejected` | a pair (extras `margin`, `score_chosen`, `score_rejected`) |
    | `chosen`, `rejected` | a pair of whole conversations: the prompt is what they share |
    | `prompt`, `completions` or `responses`, `scores` or `ranks` | a list (rank 0 is the best) |
    | `prompt`, `completion`, `label` | one completion that was liked (True) or not |
    | `prompt`, `completion` | a demonstration |
    | `messages` | a demonstration: the last assistant turn is the completion |
    | `text` | plain text without a prompt |
    | `prompt_ids`, `chosen_ids`, `rejected_ids` | a pair of token ids, used as they are |
    | `prompt_ids`, `completions_ids`, `scores` | a list of them, as rounds of self-play keep |

    With any of them `contexts` may hold, for each completion, a text (or token ids) that stands
    between the prompt and it and is not scored: a draft to be revised, say.

    Texts are strings or lists of `{"role", "content"}`. Conversations may also be strings of turns
    that start with `"\\n\\nHuman:"` and `"\\n\\nAssistant:"`.

    Args:
        row: one row of a source.
        source: where it stands, for error messages: `"pairs.jsonl:17"`.
        extras: further numeric columns to keep: a number, or a list with one for each completion.
            Other shapes are told by `EXTRA_AXES` after the name: "advantages:KT" is a list for each
            completion with a number for each scored token, its EOS included.
        index: number of the row in its source.

    Raises:
        RecordError: the row fits no layout or a value is bad.

    >>> row = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    >>> parse_record(row, "sums.jsonl:1").labels
    (1.0, 0.0)
    >>> parse_record({"prompt": "2+2=", "chosen": "4"}, "sums.jsonl:1")
    Traceback (most recent call last):
    paxo.data.records.RecordError: sums.jsonl:1: field 'rejected': expected a column of that name,
    got columns chosen, prompt; ...
    """
    if not isinstance(row, Mapping):
        raise _error(source, "row", "a JSON object", _short(row), reason="row is not an object")
    row = {name: value for name, value in row.items() if value is not None}
    for name in UNSUPPORTED:
        if row.get(name):
            raise RecordError(
                source,
                name,
                expected="no such column",
                got=_short(row[name]),
                way_out="render the prompts to strings first: they would be trained without it",
                reason=f"unsupported column {name}",
            )
    reader = _reader(row, source)
    prompt, completions, labels = reader(row, source)
    asked = {name.partition(":")[0] for name in extras}
    wanted = (*extras, *(n for n in OPTIONAL_EXTRAS if n in row and n not in asked))
    kept = {name: _extra(row, name, source, len(completions)) for name in wanted}
    contexts = _contexts(row, prompt, source, len(completions))
    return Record(prompt, completions, labels, kept, source, index, contexts)


def parse_prompt(value: Any, source: str, field: str = "prompt") -> Text:
    """A prompt out of a string or a list of messages; the last message is not the assistant's.

    >>> parse_prompt([{"role": "user", "content": "Hi"}], "prompts.jsonl:1")
    (Message(role='user', content='Hi'),)
    """
    prompt = _text(value, source, field)
    last = prompt if isinstance(prompt, str) else (prompt[-1].content if prompt else "")
    if not last.strip():
        raise _error(source, field, "some text", _short(value), reason="empty prompt")
    if not isinstance(prompt, str) and prompt[-1].role == "assistant":
        raise _error(
            source,
            f"{field}[{len(prompt) - 1}].role",
            "a turn that the assistant answers",
            "'assistant'",
            reason="prompt ends with an assistant turn",
        )
    return prompt


# Readers: (row, source) -> prompt, completions, labels.


def _pair(row: Mapping, source: str):
    if isinstance(row["prompt"], str) and _is_conversation(row["chosen"]):
        # UltraFeedback's layout: the prompt as a string, and again inside the conversations.
        return _conversations(row, source)
    prompt = parse_prompt(row["prompt"], source)
    pair = tuple(_completion(row[name], prompt, source, name) for name in ("chosen", "rejected"))
    return prompt, _distinct(pair, source), (1.0, 0.0)


def _conversations(row: Mapping, source: str):
    chosen, rejected = (_turns(row[name], source, name) for name in ("chosen", "rejected"))
    length = 0
    for one, other in zip(chosen, rejected):
        if one != other:
            break
        length += 1
    # An assistant's turn that both share is still an answer: the prompt ends before it.
    while length and chosen[length - 1].role == "assistant":
        length -= 1
    if not length:
        raise _error(
            source,
            "chosen",
            "a conversation whose first turns are those of 'rejected'",
            _short(row["chosen"]),
            reason="chosen and rejected share no prompt",
        )
    prompt = chosen[:length]
    parse_prompt([vars(message) for message in prompt], source, "chosen")
    pair = (
        _completion(chosen[length:], prompt, source, "chosen"),
        _completion(rejected[length:], prompt, source, "rejected"),
    )
    return prompt, _distinct(pair, source), (1.0, 0.0)


def _list(row: Mapping, source: str):
    field = "completions" if "completions" in row else "responses"
    prompt = parse_prompt(row["prompt"], source)
    values = row[field]
    if not isinstance(values, (list, tuple)) or not values:
        raise _error(source, field, "a list of completions", _short(values), reason="wrong type")
    completions = tuple(
        _completion(value, prompt, source, f"{field}[{k}]") for k, value in enumerate(values)
    )
    if "scores" in row:
        return prompt, completions, _numbers(row["scores"], source, "scores", len(completions))
    if "ranks" in row:
        ranks = _numbers(row["ranks"], source, "ranks", len(completions))
        return prompt, completions, tuple(max(ranks) - rank for rank in ranks)
    raise _missing(row, source, "scores")


def _unpaired(row: Mapping, source: str):
    label = row["label"]
    if not isinstance(label, (bool, numbers.Real)) or label not in (0, 1):
        raise _error(source, "label", "true or false", _short(label), reason="wrong type")
    prompt, completions, _ = _demonstration(row, source)
    return prompt, completions, (1.0 if label else -1.0,)


def _demonstration(row: Mapping, source: str):
    prompt = parse_prompt(row["prompt"], source)
    return prompt, (_completion(row["completion"], prompt, source, "completion"),), (1.0,)


def _messages(row: Mapping, source: str):
    turns = _turns(row["messages"], source, "messages")
    length = len(turns)
    while length and turns[length - 1].role == "assistant":
        length -= 1
    prompt = parse_prompt([vars(message) for message in turns[:length]], source, "messages")
    return prompt, (_completion(turns[length:], prompt, source, "messages"),), (1.0,)


def _plain(row: Mapping, source: str):
    text = row["text"]
    if not isinstance(text, str):
        raise _error(source, "text", "a string", _short(text), reason="wrong type")
    return "", (_completion(text, "", source, "text"),), (1.0,)


def _token_ids(row: Mapping, source: str):
    prompt, chosen, rejected = (
        _ids(row[name], source, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return prompt, _distinct((chosen, rejected), source), (1.0, 0.0)


def _token_id_list(row: Mapping, source: str):
    prompt, values = _ids(row["prompt_ids"], source, "prompt_ids"), row["completions_ids"]
    if not isinstance(values, (list, tuple)) or not values:
        expected = "a list of lists of token ids"
        raise _error(source, "completions_ids", expected, _short(values), reason="wrong type")
    completions = tuple(_ids(v, source, f"completions_ids[{k}]") for k, v in enumerate(values))
    return prompt, completions, _numbers(row["scores"], source, "scores", len(completions))


# The first layout whose columns are all there is the row's.
LAYOUTS = (
    (("prompt_ids", "completions_ids", "scores"), _token_id_list),
    (("prompt_ids", "chosen_ids", "rejected_ids"), _token_ids),
    (("prompt", "chosen", "rejected"), _pair),
    (("chosen", "rejected"), _conversations),
    (("prompt", "completion", "label"), _unpaired),
    (("prompt", "completion"), _demonstration),
    (("prompt", "completions"), _list),
    (("prompt", "responses"), _list),
    (("messages",), _messages),
    (("text",), _plain),
)


def _reader(row: Mapping, source: str):
    for columns, reader in LAYOUTS:
        if all(name in row for name in columns):
            return reader
    # The layout that is most nearly there says which column is missing.
    nearest = max(LAYOUTS, key=lambda layout: sum(n in row for n in layout[0]) / len(layout[0]))[0]
    raise _missing(row, source, next(name for name in nearest if name not in row))


# Values.


def _text(value: Any, source: str, field: str) -> Text:
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        expected = "a string or a list of messages"
        raise _error(source, field, expected, _short(value), reason="wrong type")
    return tuple(_message(m, source, f"{field}[{i}]") for i, m in enumerate(value))


def _message(value: Any, source: str, field: str) -> Message:
    if isinstance(value, Message):
        return value
    if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
        expected = 'a message {"role": ..., "content": ...}'
        raise _error(source, field, expected, _short(value), reason="wrong type")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        expected = f"one of {', '.join(ROLES)}"
        raise _error(source, f"{field}.role", expected, _short(role), reason="unknown role")
    if not isinstance(content, str):
        expected = "a string"
        raise _error(source, f"{field}.content", expected, _short(content), reason="wrong type")
    if value.get("tool_calls"):
        got = _short(value["tool_calls"])
        raise _error(source, f"{field}.tool_calls", "none", got, reason="unsupported tool calls")
    return Message(role, content)


def _completion(value: Any, prompt: Text, source: str, field: str) -> Text:
    """A completion of the prompt's kind: a string after messages is one turn of the assistant."""
    text = _text(value, source, field)
    if isinstance(prompt, str) and not isinstance(text, str):
        expected = "a string, as the prompt is (or write the prompt as messages too)"
        raise _error(source, field, expected, _short(value), reason="wrong type")
    if not plain_text(text).strip():
        raise _error(source, field, "some text", _short(value), reason="empty completion")
    if isinstance(prompt, str):
        return text
    messages = (Message("assistant", text),) if isinstance(text, str) else text
    for i, message in enumerate(messages):
        if message.role != "assistant":
            where, got = f"{field}[{i}].role", repr(message.role)
            reason = "completion has a turn of another role"
            raise _error(source, where, "'assistant' in a completion", got, reason=reason)
    return messages


def _is_conversation(value: Any) -> bool:
    """True for messages that do not start with the assistant: they hold the prompt too."""
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    return isinstance(first, Mapping) and first.get("role") != "assistant"


def _turns(value: Any, source: str, field: str) -> tuple[Message, ...]:
    """Messages of a whole conversation, given as such or as a Human/Assistant transcript."""
    if not isinstance(value, str):
        return _text(value, source, field)
    head, *turns = HH_TURN.split(value)
    if head.strip() or not turns:
        expected = r"messages or a transcript '\n\nHuman: ...\n\nAssistant: ...' (no 'prompt' here)"
        raise _error(source, field, expected, _short(value), reason="not a conversation")
    return tuple(
        Message(HH_ROLES[name], content.strip()) for name, content in zip(turns[::2], turns[1::2])
    )


def _distinct(pair: tuple[Text, Text], source: str) -> tuple[Text, Text]:
    if pair[0] == pair[1]:
        got = "the same text"
        reason = "chosen equals rejected"
        raise _error(source, "rejected", "another completion than 'chosen'", got, reason=reason)
    return pair


def _ids(value: Any, source: str, field: str) -> tuple[int, ...]:
    is_list = isinstance(value, (list, tuple))
    if not is_list or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
        raise _error(source, field, "a list of token ids", _short(value), reason="wrong type")
    if not value:
        reason = "empty prompt" if field == "prompt_ids" else "empty completion"
        raise _error(source, field, "at least one token", "none", reason=reason)
    return tuple(value)


def _number(value: Any, source: str, field: str) -> float:
    if not isinstance(value, numbers.Real):
        raise _error(source, field, "a number", _short(value), reason="wrong type")
    if not math.isfinite(value):
        raise _error(source, field, "a finite number", str(value), reason="value is not finite")
    return float(value)


def _numbers(value: Any, source: str, field: str, count: int | None) -> tuple[float, ...]:
    """Numbers of a list, `count` of them unless that is None."""
    if not isinstance(value, (list, tuple)):
        raise _error(source, field, "a list of numbers", _short(value), reason="wrong type")
    if count is not None and len(value) != count:
        expected, got = f"{count} values, one for each completion", f"{len(value)}"
        raise _error(source, field, expected, got, reason="labels and completions differ in number")
    return tuple(_number(x, source, f"{field}[{i}]") for i, x in enumerate(value))


def _extra(row: Mapping, name: str, source: str, count: int) -> Extra:
    column, _, axes = name.partition(":")
    if column not in row:
        raise _missing(row, source, column)
    value = row[column]
    is_list = isinstance(value, (list, tuple))
    if not axes:
        if is_list and any(isinstance(part, (list, tuple)) for part in value):
            raise RecordError(
                source,
                column,
                expected="a number, or a list with one for each completion",
                got=_short(value),
                way_out=f"tell the axes of nested lists in data.extras: '{column}:KT' for a number "
                "for each scored token, KK for pairs of completions, KD for vectors",
                reason=f"nested lists in column {column}",
            )
        if not is_list:
            return np.array(_number(value, source, column), np.float32)
        return np.array(_numbers(value, source, column, count), np.float32)
    if axes in ("K", "D"):
        return np.array(_numbers(value, source, column, None if axes == "D" else count), np.float32)
    if not is_list or len(value) != count:
        expected = f"{count} lists, one for each completion"
        raise _error(source, column, expected, _short(value), reason=f"wrong shape of {column}")
    wanted = {"KK": count, "KD": len(value[0]) if isinstance(value[0], (list, tuple)) else 0}
    parts = tuple(
        np.array(_numbers(part, source, f"{column}[{k}]", wanted.get(axes)), np.float32)
        for k, part in enumerate(value)
    )
    return parts if axes == "KT" else np.stack(parts)


def _contexts(row: Mapping, prompt: Text, source: str, count: int) -> tuple:
    values = row.get("contexts", ())
    if not isinstance(values, (list, tuple)) or len(values) not in (0, count):
        expected = f"{count} texts, one for each completion"
        raise _error(source, "contexts", expected, _short(values), reason="wrong type")
    kind = "a list of token ids" if is_ids(prompt) else "a string"
    for k, value in enumerate(values):
        if is_ids(prompt):
            fits = isinstance(value, (list, tuple)) and all(type(i) is int for i in value)
        else:
            fits = isinstance(value, str)
        if not fits:
            raise _error(source, f"contexts[{k}]", kind, _short(value), reason="wrong type")
    return tuple(tuple(value) if is_ids(prompt) else value for value in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _error(source: str, field: str, expected: str, got: str, *, reason: str) -> RecordError:
    return RecordError(source, field, expected=expected, got=got, way_out=FIX_ROW, reason=reason)


def _missing(row: Mapping, source: str, field: str) -> RecordError:
    known = "; ".join(" + ".join(columns) for columns, _ in LAYOUTS)
    return RecordError(
        source,
        field,
        expected="a column of that name",
        got=f"columns {', '.join(sorted(row)) or 'none'}",
        way_out=f"rename or convert them to one of: {known}",
        reason=f"missing column {field}",
    )
