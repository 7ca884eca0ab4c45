"""Completions that are code, judged by known tests."""

import json
import logging

import numpy as np
import pytest

from paxo.judges.checks import JudgeError
from paxo.judges.code import (
    CodeJudge,
    CodeProblem,
    humaneval_problems,
    mbpp_problems,
    mbpp_prompt,
)
from paxo.judges.sandbox import Limits, Outcome, Sandbox

START = 'import math\n\n\ndef helper(): return 2\n\n\ndef f(x):\n    """Twice x."""\n'
PROBLEM = CodeProblem("assert f(2) == 4", start=START, entry_point="f")
SANDBOX = Sandbox(Limits(seconds=20.0))


def rows(folder, name):
    with open(folder / name, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


class Recorded:
    """A sandbox that runs nothing: "good" programs pass."""

    def __init__(self):
        self.ran = []

    def run(self, program, tests):
        self.ran.append(program)
        return Outcome("passed" if "good" in program else "failed", "", "", 0.0)


@pytest.mark.parametrize(
    "completion",
    [
        "    return 2 * x",
        "    return helper() * x\n\nprint('nonsense'\nclass",
        "\n    y = 2 * x\n\n    return y\n# Another\ndef g(:",
        "def f(x):\n    return helper() * x",
        "Sure:\n```python\ndef f(x):\n    return math.floor(2 * x)\n```\nUse:\n```python\nf(5\n```",
        "```\ndef wrong(x): pass\n```\n```py\ndef f(x): return x * 2\n```",
        "```python\n    return 2 * x\n```",
        "```python\ndef f(x): return 2 * x",
    ],
)
def test_the_program_is_found_in_a_completion(completion):
    exec(f"{PROBLEM.program(completion)}\n{PROBLEM.tests}", {})


def test_without_a_start_the_first_block_or_the_whole_text_is_the_program():
    problem = CodeProblem("")
    assert problem.program("x = 1\n\ny = 2") == "x = 1\n\ny = 2"
    assert problem.program("Text\n```python\nx = 1\n```\nand\n```\nx\n```") == "x = 1\n"


def test_programs_that_pass_are_preferred_and_counted(caplog):
    judge = CodeJudge({"p": CodeProblem(""), "q": CodeProblem("")}, Recorded(), workers=1)
    with caplog.at_level(logging.INFO, "paxo.judges.code"):
        found = judge(["p", "q"], [["good", "bad", "good!"], ["bad", "worse", "bad"]])
    assert found[0].tolist() == [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]
    assert (found[1] == 0.5).all()
    assert judge.counts == {"passed": 2, "failed": 4}
    assert "ran 4 programs: 4 failed, 2 passed" in caplog.text


def test_equal_programs_run_once_and_only_those_of_wanted_comparisons_run():
    sandbox = Recorded()
    judge = CodeJudge({"p": CodeProblem("")}, sandbox, workers=1)
    wanted = np.zeros((4, 4), bool)
    wanted[3, 1] = True
    found = judge(["p"], [["bad0", "good", "bad2", "bad3"]], wanted)
    assert sandbox.ran == ["good", "bad3"]
    np.testing.assert_array_equal(found[0, 3], [np.nan, 0, np.nan, 0.5])
    assert np.isnan(found).sum() == 10
    sandbox.ran.clear()
    judge(["p"], [["good", "good", "bad", "bad"]])
    assert sandbox.ran == ["good", "bad"]
    sandbox.ran.clear()
    judge(["p"], [["good", "bad"]], np.eye(2, dtype=bool))
    assert sandbox.ran == []


def test_a_prompt_without_tests_is_named():
    with pytest.raises(JudgeError, match="prompt 1: no tests for 'q' among 1 problems"):
        CodeJudge({"p": PROBLEM}, Recorded())(["p", "q"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="workers"):
        CodeJudge({}, Recorded(), workers=0)


def test_an_error_of_the_sandbox_stops_the_judge():
    class Broken(Recorded):
        def run(self, program, tests):
            super().run(program, tests)
            raise RuntimeError("no more namespaces")

    sandbox = Broken()
    with pytest.raises(RuntimeError, match="no more namespaces"):
        CodeJudge({"p": PROBLEM}, sandbox, workers=1)(["p"], [[str(k) for k in range(50)]])
    assert len(sandbox.ran) < 50


def check_humaneval(problems):
    judge = CodeJudge(humaneval_problems(problems), SANDBOX)
    solved = [[row["canonical_solution"], "    return None\n"] for row in problems]
    scores = judge.scores([row["prompt"] for row in problems], solved)
    assert scores[:, 0].all(), [r["task_id"] for r, s in zip(problems, scores) if not s[0]]
    assert not scores[:, 1].any()


def check_mbpp(problems):
    judge = CodeJudge(mbpp_problems(problems), SANDBOX)
    others = problems[1:] + problems[:1]
    solved = [
        [f"Here:\n```python\n{row['code']}\n```", other["code"]]
        for row, other in zip(problems, others)
    ]
    scores = judge.scores([mbpp_prompt(row) for row in problems], solved)
    assert scores[:, 0].all(), [r["task_id"] for r, s in zip(problems, scores) if not s[0]]
    assert not scores[:, 1].any()


def test_reference_solutions_of_humaneval_pass_and_empty_ones_do_not(shared_data):
    check_humaneval(rows(shared_data, "verify_humaneval/problems.jsonl")[::26])


def test_reference_solutions_of_mbpp_pass_and_those_of_other_tasks_do_not(shared_data):
    problems = rows(shared_data, "verify_mbpp/problems.jsonl")
    with_setup = [row for row in problems if row["test_setup_code"]]
    assert len(with_setup) == 1
    check_mbpp(problems[::160] + with_setup)


@pytest.mark.slow
def test_all_reference_solutions_of_humaneval_pass(shared_data):
    check_humaneval(rows(shared_data, "verify_humaneval/problems.jsonl"))


@pytest.mark.slow
def test_all_reference_solutions_of_mbpp_pass(shared_data):
    check_mbpp(rows(shared_data, "verify_mbpp/problems.jsonl"))
