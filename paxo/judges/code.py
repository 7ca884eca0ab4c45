"""Code that can be checked: a completion is right if the known tests pass."""

import collections
import dataclasses
import logging
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from paxo.judges.checks import JudgeError, batch_sizes, checked_wanted
from paxo.judges.rules import preferences_from_scores
from paxo.judges.sandbox import Outcome, Sandbox

logger = logging.getLogger(__name__)

_FENCE = re.compile(
    r"```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class CodeProblem:
    """What a completion must do.

    Attributes:
        tests: Python source that raises AssertionError where the code is wrong.
        setup: source that runs between code and tests.
        start: beginning of the program that the completion goes on with, where it defines no
            `entry_point` itself.
        entry_point: function that the tests call; None where the completion is the whole program.
    """

    tests: str
    setup: str = ""
    start: str = ""
    entry_point: str | None = None

    def program(self, completion: str) -> str:
        r"""The program of a completion: its code, without the talk around it.

        The last fenced block that defines the entry point counts, else the first block, else the
        whole text. Where the code goes on with `start`, it ends with the first line after it that
        stands at the margin, as the next thing that a model without a stop writes there.

        >>> problem = CodeProblem("", start="import math\n\ndef f(x):\n", entry_point="f")
        >>> print(problem.program("    return math.pi\nprint(f(1))"))
        import math
        <BLANKLINE>
        def f(x):
            return math.pi
        """
        blocks = _FENCE.findall(completion)
        defining = [block for block in blocks if self._defines(block)]
        code = defining[-1] if defining else blocks[0] if blocks else completion
        if not self.start:
            return code
        if self._defines(code):
            # What precedes the function, such as imports and helpers, belongs to the program too.
            before = re.split(rf"(?m)^(?:async )?def {self.entry_point}\b", self.start)[0]
            return before + code
        return self.start + _continuation(code)

    def _defines(self, code: str) -> bool:
        if self.entry_point is None:
            return False
        return re.search(rf"(?m)^(?:async )?def {re.escape(self.entry_point)}\b", code) is not None


@dataclasses.dataclass(frozen=True)
class CodeJudge:
    """Prefers code that passes the tests; two that pass or two that do not tie.

    Each program runs in a process of its own under `sandbox.limits`, see `paxo.judges.sandbox` for
    what holds it and what does not. Equal programs of a call run once.

    Attributes:
        problems: prompt -> problem, from `humaneval_problems`, `mbpp_problems` or made.
        sandbox: where programs run.
        workers: programs that run at once; None takes the number of processors.
        name: what errors and the log call it.
        counts: completions judged so far by status: "passed", "failed", "error", "timeout".

    >>> judge = CodeJudge({"Write f.": CodeProblem("assert f() == 1")})
    >>> judge(["Write f."], [["def f(): return 1", "def f(): return 2"]])[0].tolist()
    [[0.5, 1.0], [0.0, 0.5]]
    """

    problems: Mapping[str, CodeProblem]
    sandbox: Sandbox = dataclasses.field(default_factory=Sandbox)
    workers: int | None = None
    name: str = "code"
    counts: collections.Counter = dataclasses.field(
        default_factory=collections.Counter, compare=False
    )

    def __post_init__(self):
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1; got {self.workers}")

    def outcomes(
        self, prompts: Sequence[str], completions: Sequence[Sequence[str]]
    ) -> list[list[Outcome]]:
        """`[B][K]` how each completion's program ended.

        Raises:
            JudgeError: for a prompt without a problem.
            SandboxError: if programs cannot be run here at all.
        """
        batch_sizes(prompts, completions, self.name)
        jobs = []
        for b, (prompt, row) in enumerate(zip(prompts, completions)):
            if prompt not in self.problems:
                raise JudgeError(
                    f"judge {self.name!r}, prompt {b}: no tests for {str(prompt)[:60]!r} among "
                    f"{len(self.problems)} problems: take prompts and problems from the same rows"
                )
            problem = self.problems[prompt]
            tests = f"{problem.setup}\n{problem.tests}"
            jobs.append([(problem.program(completion), tests) for completion in row])
        stop = threading.Event()

        def run(job: tuple[str, str]) -> Outcome | None:
            return None if stop.is_set() else self.sandbox.run(*job)

        distinct = list(dict.fromkeys(job for row in jobs for job in row))
        with ThreadPoolExecutor(self.workers or os.cpu_count() or 1) as pool:
            try:
                found = dict(zip(distinct, pool.map(run, distinct)))
            except BaseException:
                stop.set()
                raise
        outcomes = [[found[job] for job in row] for row in jobs]
        now = collections.Counter(outcome.status for row in outcomes for outcome in row)
        self.counts.update(now)
        logger.info(
            "judge %r ran %d programs: %s",
            self.name,
            len(distinct),
            ", ".join(f"{number} {status}" for status, number in sorted(now.items())),
        )
        return outcomes

    def scores(self, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> np.ndarray:
        """`[B, K]` float64: 1 where the tests pass, else 0."""
        outcomes = self.outcomes(prompts, completions)
        return np.array([[float(o.status == "passed") for o in row] for row in outcomes])

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """`[B, K, K]`: 1 where i passes and j does not, 0 the other way round, 1/2 at a tie.

        Args:
            prompts: of the problems.
            completions: K of each.
            wanted: `[K, K]`; completions in none of its comparisons are not run.
        """
        num_prompts, num = batch_sizes(prompts, completions, self.name)
        wanted = checked_wanted(wanted, num, self.name)
        if wanted is None:
            return preferences_from_scores(self.scores(prompts, completions))
        asked = wanted & ~np.eye(num, dtype=bool)
        used = np.flatnonzero(asked.any(0) | asked.any(1))
        found = np.full((num_prompts, num, num), np.nan)
        found[:, range(num), range(num)] = 0.5
        if used.size:
            scores = self.scores(prompts, [[row[k] for k in used] for row in completions])
            found[:, used[:, None], used] = preferences_from_scores(scores)
        return found


def humaneval_problems(rows: Iterable[Mapping[str, Any]]) -> dict[str, CodeProblem]:
    r"""prompt -> problem, of rows with HumanEval's columns.

    >>> row = {"prompt": "def f():\n", "test": "def check(f): assert f()", "entry_point": "f"}
    >>> humaneval_problems([row])["def f():\n"].tests
    'def check(f): assert f()\ncheck(f)'

    Chen et al. 2021, arXiv:2107.03374.
    """
    return {
        row["prompt"]: CodeProblem(
            tests=f"{row['test']}\ncheck({row['entry_point']})",
            start=row["prompt"],
            entry_point=row["entry_point"],
        )
        for row in rows
    }


def mbpp_problems(rows: Iterable[Mapping[str, Any]]) -> dict[str, CodeProblem]:
    """prompt -> problem, of rows with MBPP's columns; the prompt is `mbpp_prompt(row)`.

    Austin et al. 2021, arXiv:2108.07732.
    """
    return {
        mbpp_prompt(row): CodeProblem(
            tests="\n".join(row["test_list"]), setup=row["test_setup_code"].replace("\r", "")
        )
        for row in rows
    }


def mbpp_prompt(row: Mapping[str, Any]) -> str:
    r"""The task with the tests that the code shall pass: they name the function.

    >>> mbpp_prompt({"prompt": "Write f.", "test_list": ["assert f()"]})
    'Write f.\nYour code should pass these tests:\n\nassert f()'
    """
    return f"{row['prompt']}\nYour code should pass these tests:\n\n" + "\n".join(row["test_list"])


def _continuation(code: str) -> str:
    """The lines up to the first one that stands at the margin after a line that does not."""
    kept, indented = [], False
    for line in code.splitlines():
        if line.strip() and not line[0].isspace():
            if indented:
                break
        elif line.strip():
            indented = True
        kept.append(line)
    return "\n".join(kept)
