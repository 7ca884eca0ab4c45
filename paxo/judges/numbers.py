r"""Answers that can be checked: the final number of a completion against the known one.

Where the answer stands, first rule that finds one: the last `\boxed{...}`; the last `####`, as
GSM8K writes it; the last "answer is", "answer:" or "answer ="; the last number of the text. Numbers
are read exactly: 1,234.5, -$3, 3/4, 2 1/2, ½, \frac{3}{4}, 1.5e3, 1.5 \times 10^3. A unit, a
currency and a percent sign are left out on both sides: 50% is 50, as GSM8K has it, and no unit is
converted.
"""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from paxo.judges.checks import JudgeError, batch_sizes
from paxo.judges.rules import preferences_from_scores

# A number longer than this is no answer, and costs time without bound to compute with.
MAX_DIGITS = 400

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![\w.]))?"
_NUMBER = re.compile(
    # A minus between two operands is no sign: neither in 12-5 nor in 12 - 5 and 12 -5.
    r"(?:(?<![\w.)\]}])(?<![\d)\]}]\s)(?P<sign>[-+]))?(?P<currency>(?<!\w)[$€£¥])?"
    rf"(?P<inner>(?<=[$€£¥])-)?(?<![\w.])(?:(?P<whole>\d+)\s+(?P<of>\d+)/(?P<parts>\d+)"
    rf"|(?P<first>{_DECIMAL})(?:/(?P<second>{_DECIMAL}))?)"
)
_PHRASE = re.compile(r"\banswers?\b[*_\s]*(?:is|are|was|:|=)[*_\s:]*", re.IGNORECASE)
_END_OF_SENTENCE = re.compile(r"[.!?](?=\s|$)|\n")
_LATEX = (
    (re.compile(r"(?<=\d)(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?)([\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}"), r"\1\2/\3"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!]"), ""),
    (re.compile(r"\\[;: ]|~"), " "),
    (re.compile(r"\\([$%#])"), r"\1"),
    (re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|[×x*·])\s*10\s*(?:\^|\*\*)\s*\{?\s*([+-]?\d+)(?:\s*\})?"),
     r"e\1"),
    (re.compile(r"=\s*([-+])\s+(?=[\d.$])"), r"= \1"),
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹", "-+0123456789")


@dataclasses.dataclass(frozen=True)
class AnswerJudge:
    """Prefers a right answer to a wrong one; two right or two wrong ones tie.

    Attributes:
        answers: prompt -> known answer, see `known_answers`.
        tolerance: relative, for numbers that are not both whole; whole ones must be equal.
        name: what errors call it.
        counts: completions judged so far: "right", "wrong" and "no answer", in which none was
            found.

    >>> judge = AnswerJudge({"2 + 2?": "4"})
    >>> judge(["2 + 2?"], [["It is 4.", "I say 5."]])[0].tolist()
    [[0.5, 1.0], [0.0, 0.5]]
    """

    answers: Mapping[str, Any]
    tolerance: float = 1e-6
    name: str = "answers"
    counts: collections.Counter = dataclasses.field(
        default_factory=collections.Counter, compare=False
    )

    def __post_init__(self):
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1); got {self.tolerance}")

    def scores(self, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> np.ndarray:
        """`[B, K]` float64: 1 for the right answer, 0 for another or none.

        Raises:
            JudgeError: for a prompt whose answer is not known.
        """
        found = np.zeros(batch_sizes(prompts, completions, self.name))
        for b, (prompt, row) in enumerate(zip(prompts, completions)):
            if prompt not in self.answers:
                raise JudgeError(
                    f"judge {self.name!r}, prompt {b}: no known answer to {str(prompt)[:60]!r} "
                    f"among {len(self.answers)}: take prompts and answers from the same rows"
                )
            known = self.answers[prompt]
            for k, completion in enumerate(row):
                right = same_answer(completion, known, tolerance=self.tolerance)
                found[b, k] = bool(right)
                self.counts["no answer" if right is None else "right" if right else "wrong"] += 1
        return found

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """`[B, K, K]`: 1 where i is right and j is not, 0 the other way round, 1/2 at a tie."""
        del wanted
        return preferences_from_scores(self.scores(prompts, completions))


def known_answers(
    rows: Iterable[Mapping[str, Any]], *, prompt: str = "prompt", answer: str = "answer"
) -> dict[str, Any]:
    """prompt -> answer of the rows of a data set.

    Args:
        rows: of the data set.
        prompt: column of the prompt.
        answer: column of the answer, a number or a text.

    Raises:
        ValueError: if a prompt comes twice with different answers.

    >>> known_answers([{"prompt": "2 + 2?", "answer": "4"}])
    {'2 + 2?': '4'}
    """
    found: dict[str, Any] = {}
    for number, row in enumerate(rows):
        if found.setdefault(row[prompt], row[answer]) != row[answer]:
            raise ValueError(
                f"row {number}: the prompt {row[prompt][:60]!r} came before with the answer "
                f"{found[row[prompt]]!r}, now with {row[answer]!r}: keep one of them"
            )
    return found


def same_answer(completion: str, known: Any, *, tolerance: float = 1e-6) -> bool | None:
    """Whether a completion ends in the known answer; None if it gives none.

    Args:
        completion: any text.
        known: a number, a text that is one, or another text, which must then be stated in a box,
            after `####`, after "answer is" or alone in the last line.
        tolerance: relative, for numbers that are not both whole.

    >>> [same_answer(text, "0.75") for text in ("so 3/4 of it", "The answer is 0.7.", "No idea.")]
    [True, False, None]
    """
    expected = read_number(str(known))
    if expected is None:
        stated = stated_answer(completion)
        if stated is None:
            lines = completion.strip().splitlines()
            stated = lines[-1] if lines else None
        return None if stated is None else _plain(stated) == _plain(str(known))
    found = final_number(completion)
    if found is None:
        return None
    if found.denominator == expected.denominator == 1:
        return found == expected
    return abs(found - expected) <= Fraction(tolerance) * abs(expected)


def final_number(completion: str) -> Fraction | None:
    r"""The number that a completion gives as its answer; None if there is none.

    >>> [str(final_number(text)) for text in (r"\boxed{\frac{3}{4}}", "it is 7, no: $1,200")]
    ['3/4', '1200']
    """
    stated = stated_answer(completion)
    if stated is not None:
        # "3 + 4 = 7" states 7; "7 of 12 apples" states 7.
        numbers = _numbers(stated.rpartition("=")[2]) or _numbers(stated)
        if numbers:
            return numbers[0]
    numbers = _numbers(completion)
    return numbers[-1] if numbers else None


def read_number(text: str) -> Fraction | None:
    """The number that a text is, but for a currency or percent sign; None if it is anything else.

    >>> [str(read_number(text)) for text in ("-1,200.50", "$5", "50 %", "1e3", "5 apples")]
    ['-2401/2', '5', '50', '1000', 'None']
    """
    text = _clean(text).strip().strip("$").removesuffix("%").strip()
    match = _NUMBER.fullmatch(text)
    return _value(match) if match else None


def stated_answer(completion: str) -> str | None:
    r"""What stands in the last box, after the last `####` or after "answer is"; None if nothing.

    >>> stated_answer(r"So \boxed{x = \text{no}} it is."), stated_answer("The answer is: 4. Bye.")
    ('x = \\text{no}', '4')
    """
    boxed = _last_box(completion)
    if boxed is not None:
        return boxed
    _, mark, rest = completion.rpartition("####")
    if mark and rest.strip():
        return rest.strip().splitlines()[0].strip()
    phrases = list(_PHRASE.finditer(completion))
    if phrases:
        rest = completion[phrases[-1].end() :]
        end = _END_OF_SENTENCE.search(rest)
        stated = rest[: end.start() if end else len(rest)].strip()
        return stated or None
    return None


def _last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces close."""
    starts = {match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)}
    opened, last, end = [], 0, 0
    for match in re.finditer("[{}]", text):
        if match[0] == "{":
            opened.append(match.end())
        elif opened and (start := opened.pop()) in starts and start > last:
            last, end = start, match.start()
    return text[last:end] if last else None


def _numbers(text: str) -> list[Fraction]:
    values = (_value(match) for match in _NUMBER.finditer(_clean(text)))
    return [value for value in values if value is not None]


def _clean(text: str) -> str:
    """One spelling for minus signs, fractions and powers of ten."""
    text = text.replace("\N{MINUS SIGN}", "-")
    text = "".join(
        " " + unicodedata.normalize("NFKC", c).replace("\N{FRACTION SLASH}", "/")
        if unicodedata.decomposition(c).startswith("<fraction>")
        else c
        for c in text
    )
    text = re.sub(r"(?<=10)[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^" + m[0].translate(_SUPERSCRIPTS), text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _value(match: re.Match) -> Fraction | None:
    if len(match[0]) > MAX_DIGITS:
        return None
    negative = match["sign"] == "-" or match["inner"] is not None
    if match["whole"] is not None:
        part = _quotient(match["of"], match["parts"])
        value = None if part is None else int(match["whole"]) + part
    elif match["second"] is not None:
        value = _quotient(match["first"], match["second"])
    else:
        value = _decimal(match["first"])
    return -value if negative and value is not None else value


def _quotient(numerator: str, denominator: str) -> Fraction | None:
    above, below = _decimal(numerator), _decimal(denominator)
    return None if above is None or not below else above / below


def _decimal(text: str) -> Fraction | None:
    exponent = re.search(r"[eE][+-]?(\d+)$", text)
    if exponent and int(exponent[1]) > MAX_DIGITS:
        return None
    return Fraction(text.replace(",", ""))


def _plain(text: str) -> str:
    """A text without case, spaces, marks around it and LaTeX's ways of writing words."""
    for pattern, replacement in _LATEX[3:]:
        text = pattern.sub(replacement, text)
    return re.sub(r"[\s$]", "", text).strip("*_`'\".,;:!").lower()
