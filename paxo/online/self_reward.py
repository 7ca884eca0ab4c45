"""The policy as its own judge: it scores its answers in words, and the points are read from them.

arXiv:2401.10020 has one model both answer and judge, by an additive scale of five points, and takes
the mean of three judgements.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paxo.online.drawing import Drawer
from paxo.online.groups import Prompt
from paxo.online.judging import Reward
from paxo.online.method import Draw
from paxo.types import Array, Params

logger = logging.getLogger(__name__)

# In our own words; {prompt} and {completion} are filled in.
TEMPLATE = """Below are a question and an answer to it. Give the answer points, one for each of \
these statements that is true of it, so that they add up to between 0 and 5:

1. It has to do with the question and says something about it, even if not all of it fits.
2. It deals with a good part of what was asked, even if it does not settle the question.
3. It answers the main parts of the question in a useful way, whoever may have written it.
4. It is written for the one who asked, to the point, complete and in good order, with little \
left to improve.
5. It fits the question perfectly, shows knowledge of the matter, and has nothing superfluous.

Question: {prompt}

Answer: {completion}

First say in a few words why you give these points. Then end with a line "Score: " and the number \
of points.
"""
SCORE = re.compile(r"score\s*[:=]?\s*\**\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)


def points(reply: str, highest: float = 5.0) -> float | None:
    """The number behind the last "Score:" of a judgement; None without one from 0 to `highest`.

    >>> points("Useful, but long. Score: 4"), points("It deserves four points."), points("Score: 9")
    (4.0, None, None)
    """
    found = SCORE.findall(reply)
    value = float(found[-1]) if found else None
    return value if value is not None and 0 <= value <= highest else None


@dataclasses.dataclass(frozen=True, eq=False)
class SelfReward:
    """A reward that the policy of each round gives itself; one of `Judges.rewards`.

    A judgement that cannot be read, or is too long to be asked for, is no score: it is counted in
    the log. A completion without any has the reward NaN, is counted among the round's figures and
    not trained on.

    Attributes:
        drawer: draws the judgements; its `max_new_tokens` is what they may be long.
        encode: the text of a question to the judge -> token ids, as at generation time.
        decode: token ids of a judgement -> text.
        template: of the question, with `{prompt}` and `{completion}`.
        parse: judgement -> points, or None.
        draws: judgements of each completion, whose mean is its reward.
        may_fail: True: NaN stands for no reward.

    Raises:
        ValueError: for a template without these places, or no draws.
    """

    drawer: Drawer
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    template: str = TEMPLATE
    parse: Callable[[str], float | None] = points
    draws: int = 3
    may_fail: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self):
        for place in ("{prompt}", "{completion}"):
            if place not in self.template:
                raise ValueError(f"template has no {place}: the judge would not see it")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1; got {self.draws}")

    def of_policy(self, params: Params, key: Array) -> Reward:
        """The reward function of one policy.

        Args:
            params: of the policy that judges.
            key: of the draws; a completion's also depend on its place.

        Returns:
            `(prompts, completions) -> [B, N]` mean points, NaN without any.
        """

        def reward(prompts: Sequence[Any], completions: Sequence[Sequence[Any]]) -> np.ndarray:
            asked = [
                self._question(str(prompt), str(text))
                for prompt, row in zip(prompts, completions)
                for text in row
            ]
            found = self._points(asked, params, key)
            return found.reshape(len(prompts), -1)

        reward.may_fail = True
        return reward

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Sequence[Any]]) -> Any:
        """Raises TypeError: without a policy there is nobody to judge."""
        raise TypeError("SelfReward judges with a policy: call of_policy(params, key) first")

    def _question(self, prompt: str, completion: str) -> str:
        texts = {"{prompt}": prompt, "{completion}": completion}  # which may hold braces themselves
        return re.sub(r"\{prompt\}|\{completion\}", lambda found: texts[found[0]], self.template)

    def _points(self, asked: Sequence[str], params: Params, key: Array) -> np.ndarray:
        """`[N]` mean points of each question."""
        questions = [
            Prompt(np.asarray(self.encode(text), np.int32), i) for i, text in enumerate(asked)
        ]
        limit = self.drawer.max_prompt
        fitting = [q for q in questions if limit is None or len(q.ids) <= limit]
        found = np.full((len(asked), self.draws), np.nan)
        if fitting:
            drawn = self.drawer(Draw("policy", self.draws), {"policy": params}, fitting, key)
            for question, row in zip(fitting, drawn.tokens):
                read = [self.parse(self.decode(tokens.tolist())) for tokens in row]
                found[question.index] = [np.nan if x is None else x for x in read]
        self._tell(found, len(asked) - len(fitting))
        there = ~np.isnan(found)
        total, count = np.where(there, found, 0).sum(-1), there.sum(-1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def _tell(self, found: np.ndarray, too_long: int) -> None:
        unread = int(np.isnan(found).sum()) - too_long * self.draws
        if unread or too_long:
            logger.warning(
                "%d of %d judgements without a score; %d of %d questions too long to be asked",
                unread, found.size, too_long, len(found),
            )  # fmt: skip
