"""A language model as judge: asked in both orders, each reply kept, no answer taken for a tie."""

import collections
import dataclasses
import hashlib
import json
import logging
import pathlib
import re
import string
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from paxo.judges.checks import (
    JudgeError,
    batch_sizes,
    checked_wanted,
    preferences_of_pairs,
    wanted_pairs,
)
from paxo.judges.http import Endpoint, EndpointError
from paxo.judges.reply_cache import ReplyCache
from paxo.losses.reward import order_corrected

logger = logging.getLogger(__name__)

SYSTEM = (
    "You are an impartial judge. You compare two responses to the same prompt by how helpful, "
    "correct and harmless they are. Neither the order in which they stand nor their length counts."
)
TEMPLATE = """[Prompt]
{prompt}

[Response A]
{a}

[End of response A]

[Response B]
{b}

[End of response B]

Compare the two responses in a few sentences. Then give your verdict in the last line, and nothing \
after it: [[A]] if response A is better, [[B]] if response B is better, [[C]] if they are equally \
good."""

VALUES = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}
_MARKED = re.compile(r"\[\[\s*(a|b|c|tie)\s*\]\]", re.IGNORECASE)
_NAMED = re.compile(  # capitals only: "the answer is a good one" names nobody
    r"(?i:\b(?:verdict|winner|answer|preference|choice)\b\W{0,3}(?:is\b|:|=)\W{0,4}"
    r"(?:response|assistant|answer|option|completion)?)\W{0,3}(A|B|C|(?i:tie))(?![\w'])"
)
_BETTER = re.compile(
    r"\b(?:response|assistant|option|completion)\W{0,3}(a|b)\W{0,3}\s+is\s+(?:\w+ly |much |far )?"
    r"(?:the )?(?:better|best|preferred|preferable|superior|stronger|winner)\b",
    re.IGNORECASE,
)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class LanguageModelJudge:
    """Asks a language model which of two texts is better, in both orders of presentation.

    P(i beats j) is the mean of the two verdicts, so that a model which always likes the first text
    says 1/2. Equal texts tie without being asked. Every reply with a verdict is kept on disk under
    the content of its request: a run that was killed, or whose endpoint died, goes on where it was.

    Attributes:
        endpoint: the model.
        cache: file of the replies.
        template: of a question, with the fields {prompt}, {a} and {b}; it must ask for [[A]], [[B]]
            or [[C]] (a tie).
        system: system message; empty for none.
        on_failure: what happens to a reply without a verdict: "raise", or "skip", which counts and
            logs it and leaves the comparison NaN for the loop to leave out. It is not kept, so a
            later call asks again. An endpoint that does not reply always raises.
        name: what errors and the log call it.
        counts: so far: "asked", "from cache", "equal texts", "without verdict" (replies), "skipped"
            (comparisons), "compared", "changed with the order" (comparisons whose two verdicts do
            not agree).

    Raises:
        ValueError: for a template without one of its fields, or an unknown policy.
        EndpointError: if the variable of the API key is not set.
    """

    endpoint: Endpoint
    cache: str | pathlib.Path
    template: str = TEMPLATE
    system: str = SYSTEM
    on_failure: Literal["raise", "skip"] = "raise"
    name: str = "language model"
    counts: collections.Counter = dataclasses.field(
        default_factory=collections.Counter, compare=False
    )

    def __post_init__(self):
        fields = sorted(field for _, field, _, _ in string.Formatter().parse(self.template)
                        if field is not None)  # fmt: skip
        if fields != ["a", "b", "prompt"]:
            raise ValueError(
                f"template must hold {{prompt}}, {{a}} and {{b}} once each, other braces doubled; "
                f"got the fields {fields}"
            )
        if self.on_failure not in ("raise", "skip"):
            raise ValueError(f"on_failure must be 'raise' or 'skip'; got {self.on_failure!r}")
        self.endpoint.key()

    def request(self, prompt: str, first: str, second: str) -> dict[str, Any]:
        """The request that shows `first` as A and `second` as B."""
        question = self.template.format(prompt=prompt, a=first, b=second)
        messages = [{"role": "user", "content": question}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return self.endpoint.request(messages)

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """`[B, K, K]` probability that i beats j; NaN where not wanted, or skipped.

        Raises:
            JudgeError: for a reply without a verdict, if `on_failure` is "raise"; all other replies
                are kept before.
            EndpointError: if the endpoint does not reply.
        """
        _, num = batch_sizes(prompts, completions, self.name)
        pairs = wanted_pairs(checked_wanted(wanted, num, self.name), num)
        _check_texts(prompts, completions, self.name)
        requests: dict[str, dict[str, Any]] = {}
        questions: dict[tuple[int, int, int], str] = {}  # prompt, first, second -> key
        for b, (prompt, texts) in enumerate(zip(prompts, completions)):
            for pair in pairs:
                for first, second in (pair, pair[::-1]):
                    if texts[first] == texts[second]:
                        continue
                    request = self.request(prompt, texts[first], texts[second])
                    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
                    requests[key] = request
                    questions[b, first, second] = key
        replies = self._replies(requests)
        verdicts = {key: parse_verdict(reply) for key, reply in replies.items()}
        lost = [question for question, key in questions.items() if verdicts[key] is None]
        self.counts["without verdict"] += sum(verdict is None for verdict in verdicts.values())
        if lost and self.on_failure == "raise":
            b, first, second = lost[0]
            raise JudgeError(
                f"judge {self.name!r}, prompt {b}, pair ({first}, {second}) shown in this order: "
                "expected [[A]], [[B]] or [[C]] in the reply; got "
                f"{replies[questions[lost[0]]][-300:]!r} ({len(lost)} of {len(questions)} replies "
                "are so; the others are kept): ask more plainly in the template, give more "
                "max_tokens, or take on_failure='skip'"
            )
        answers = np.full((len(prompts), len(pairs)), 0.5)
        for b in range(len(prompts)):
            for number, (i, j) in enumerate(pairs):
                if (b, i, j) in questions:
                    there, back = (verdicts[questions[b, *p]] for p in ((i, j), (j, i)))
                    answers[b, number] = self._compared(there, back)
                else:
                    self.counts["equal texts"] += 1
        if lost:
            logger.warning(
                "judge %r: %d of %d replies hold no verdict; %d of %d comparisons are left out",
                self.name, len(lost), len(questions), np.isnan(answers).sum(), answers.size,
            )  # fmt: skip
        return preferences_of_pairs(answers, pairs, num)

    def _compared(self, there: float | None, back: float | None) -> float:
        if there is None or back is None:
            self.counts["skipped"] += 1
            return float("nan")
        self.counts["compared"] += 1
        self.counts["changed with the order"] += there + back != 1
        return order_corrected(there, back)

    def _replies(self, requests: dict[str, dict[str, Any]]) -> dict[str, str]:
        """key -> reply, from the cache and, for the others, from the endpoint."""
        cache = ReplyCache(self.cache)
        try:
            found = {key: reply for key in requests if (reply := cache.get(key)) is not None}
            self.counts["from cache"] += len(found)
            missing = {key: request for key, request in requests.items() if key not in found}
            stop, errors = threading.Event(), []

            def ask(key: str) -> None:
                if stop.is_set():
                    return
                try:
                    found[key] = reply = self.endpoint.ask(missing[key], stop)
                    if parse_verdict(reply) is not None:
                        cache.put(key, reply)
                except Exception as error:
                    errors.append(error)
                    stop.set()  # the others finish the attempt they are at and start no more

            with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
                try:
                    for future in [pool.submit(ask, key) for key in missing]:
                        future.result()
                finally:
                    stop.set()
            self.counts["asked"] += sum(key in found for key in missing)
            if errors and isinstance(errors[0], EndpointError):
                raise EndpointError(
                    f"judge {self.name!r}: {errors[0]}. {len(cache)} replies are kept in "
                    f"{self.cache}: the same run, when the endpoint is back, asks for the rest only"
                ) from errors[0]
            if errors:
                raise errors[0]
        finally:
            cache.close()
        return found


def parse_verdict(reply: str) -> float | None:
    """1 if A is better, 0 if B is, 1/2 for a tie; None if the reply does not say.

    In this order: the last [[A]]; the last "verdict: A", "the better answer is B"; "response A is
    better", if all such sentences agree; a line, last or first, that is the letter alone. What
    stands between <think> tags does not count.

    >>> [parse_verdict(text) for text in ("... [[A]]", "Verdict: **B**", "c", "Both have merits.")]
    [1.0, 0.0, 0.5, None]
    """
    text = _THOUGHT.sub("", reply)
    if "<think>" in text.lower():  # cut off in the middle of a thought
        return None
    for pattern in (_MARKED, _NAMED):
        found = pattern.findall(text)
        if found:
            return VALUES[found[-1].lower()]
    better = {label.lower() for label in _BETTER.findall(text)}
    if better:
        return VALUES[better.pop()] if len(better) == 1 else None
    lines = [line.strip("*_`#'\".:()[] \t").lower() for line in text.strip().splitlines()]
    for line in (lines[-1], lines[0]) if lines else ():
        line = re.sub(r"^(?:response|assistant|answer|option)\s+", "", line)
        if line in VALUES:
            return VALUES[line]
    return None


def _check_texts(prompts: Sequence[Any], completions: Sequence[Sequence[Any]], name: str) -> None:
    for b, row in enumerate(zip(prompts, completions)):
        for text in (row[0], *row[1]):
            if not isinstance(text, str):
                raise JudgeError(
                    f"judge {name!r}, prompt {b}: expected texts; got {type(text).__name__}: "
                    "decode tokens and render conversations first"
                )
