"""The final number of a completion against the known one."""

import gzip
import json
import math
import random
import time
from fractions import Fraction

import numpy as np
import pytest

from paxo.judges.checks import JudgeError
from paxo.judges.numbers import (
    AnswerJudge,
    final_number,
    known_answers,
    read_number,
    same_answer,
    stated_answer,
)

# Ways of ending a completion; {a} is the answer, {w} another number.
ENDINGS = (
    "First {w}, then {a}",
    "It is not {w}.\nThe answer is {a}.",
    "The answer is {a}. Of the {w} others I know nothing.",
    "**Answer:** {a}\n\nNote: {w} was a detour.",
    "So the final answer is: \\boxed{{{a}}} and not {w}.",
    "{w} - {w} + {a} = {a}\n#### {a}",
    "The answer is {w} + {w} = ${a}.",
    "$$x = \\boxed{{\\${a}}}$$",
    "The final answers are **{a}** apples, {w} eaten",
)


def rows(folder, name):
    with open(folder / name, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("x = 42.", "42"),
        ("1,234,567 of 2,000", "2000"),
        ("total: 1,234.50", "2469/2"),
        ("-7", "-7"),
        ("= - 7", "-7"),
        ("\N{MINUS SIGN}7", "-7"),
        ("-$3.50", "-7/2"),
        ("$-3.50", "-7/2"),
        ("12 - 5", "5"),
        ("12-5", "5"),
        ("2(3)-4", "4"),
        ("it is (-4)", "-4"),
        ("3/4", "3/4"),
        ("-3/4 cups", "-3/4"),
        ("2 1/2 hours", "5/2"),
        ("½", "1/2"),
        ("3½ hours", "7/2"),
        (r"\frac{3}{4}", "3/4"),
        (r"-\dfrac{3}{4}", "-3/4"),
        (r"2\frac{1}{2}", "5/2"),
        (r"\frac12", "1/2"),
        ("50%", "50"),
        (r"50\%", "50"),
        ("1.5e3", "1500"),
        ("2E-2", "1/50"),
        (r"1.5 \times 10^{3}", "1500"),
        ("1.5×10³ m", "1500"),
        ("6 x 10^-2", "3/50"),
        (r"10{,}000", "10000"),
        (r"5\,000\ \text{km}", "5000"),
        ("18th of 5km", "5"),
        ("**8**", "8"),
        (".5", "1/2"),
    ],
)
def test_a_number_is_read_exactly(text, number):
    assert final_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text", ["", "none", "H2O", "1/0", "0/0", "2 1/0", "1e999999999", "9" * 5000]
)
def test_what_is_no_number_is_none(text):
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} then \boxed{\frac{3}{4}}, so 9", r"\frac{3}{4}"),
        (r"\boxed{7} but \boxed{8 never closes", "7"),
        ("#### 5\n#### 6 eggs\nmore 7", "6 eggs"),
        ("The answer is 1. The answer is: 2 apples! 3", "2 apples"),
        ("answers 4 to 5", None),
        ("####", None),
    ],
)
def test_the_answer_stands_in_the_last_box_or_mark_or_phrase(text, expected):
    assert stated_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5 apples", None), ("$5", 5), ("50 %", 50), ("-1,000", -1000), ("no", None), ("3 4", None)],
)
def test_only_a_text_that_is_a_number_is_read_as_one(text, expected):
    assert read_number(text) == expected


@pytest.mark.parametrize(
    ("completion", "known", "right"),
    [
        ("1000001", "1000000", False),  # whole numbers have no tolerance
        ("It is 0.6666667", "0.6666666667", True),
        ("2/3", 0.6666666667, True),
        ("It is 0.667", "0.6666666667", False),
        ("43", 43.0, True),
        ("43.0 apples", "43", True),
        ("0.0000001", "0", False),
        ("It is 50%", "50", True),
        ("It is -5", "5", False),
        ("nothing", "5", None),
        (r"\boxed{\text{Yes}}", "yes", True),
        ("The answer is **no**.", "yes", False),
        ("Some thought.\nYes.", "yes", True),
        (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}", True),
        ("", "yes", None),
    ],
)
def test_an_answer_is_right_wrong_or_none(completion, known, right):
    assert same_answer(completion, known) is right


def test_right_beats_wrong_and_the_judge_counts():
    judge = AnswerJudge({"p": "4", "q": "-1"})
    found = judge(["q", "p"], [["-1", "1", "none"], ["4", "2 + 2 = 4", "5"]])
    assert found[0].tolist() == [[0.5, 1, 1], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    assert found[1].tolist() == [[0.5, 0.5, 1], [0.5, 0.5, 1], [0, 0, 0.5]]
    assert judge.counts == {"right": 3, "wrong": 2, "no answer": 1}


def test_a_prompt_without_a_known_answer_is_named():
    with pytest.raises(JudgeError, match="prompt 1: no known answer to 'q' among 1"):
        AnswerJudge({"p": "4"})(["p", "q"], [["4"], ["4"]])


def test_settings_and_conflicting_answers_are_refused():
    with pytest.raises(ValueError, match="tolerance"):
        AnswerJudge({}, tolerance=-1)
    with pytest.raises(
        ValueError, match="row 1: the prompt 'p' came before with the answer 1, now"
    ):
        known_answers([{"prompt": "p", "answer": 1}, {"prompt": "p", "answer": 2}])


def check_endings(answers, draw):
    """Every ending gives the answer back, and another number in its place does not."""
    for answer in answers:
        other = draw.choice(answers)
        value, another = (float(str(x).replace(",", "")) for x in (answer, other))
        for ending in ENDINGS:
            assert same_answer(ending.format(a=answer, w=other), answer), (ending, answer, other)
            if value != another:
                wrong = ending.format(a=other, w=answer)
                assert same_answer(wrong, answer) is False, (ending, answer, other)


def test_gsm8k_solutions_give_their_answers_and_those_of_others_do_not(shared_data):
    problems = rows(shared_data, "verify_gsm8k/test.jsonl")
    judge = AnswerJudge(known_answers(problems))
    prompts = [row["prompt"] for row in problems]
    others = problems[1:] + problems[:1]
    scores = judge.scores(
        prompts, [[row["solution"], other["solution"]] for row, other in zip(problems, others)]
    )
    np.testing.assert_array_equal(scores[:, 0], 1)
    same = [row["answer"] == other["answer"] for row, other in zip(problems, others)]
    np.testing.assert_array_equal(scores[:, 1], same)
    assert math.fsum(same) < len(problems) / 20
    check_endings([row["answer"] for row in problems[:300]], random.Random(0))
    check_endings([f"{int(row['answer']):,}" for row in problems[:300]], random.Random(1))


def test_model_solutions_of_gsm8k_are_right_where_their_authors_found_them_so(shared_data):
    with gzip.open(shared_data / "lists_gsm8k_solutions/lists.jsonl.gz", "rt") as lines:
        problems = [json.loads(line) for line in lines]
    judge = AnswerJudge(known_answers(problems))
    scores = judge.scores([r["prompt"] for r in problems], [r["responses"] for r in problems])
    np.testing.assert_array_equal(scores, [row["scores"] for row in problems])
    assert scores.shape == (1055, 4)


def test_many_boxes_that_never_close_cost_no_square_of_their_number():
    start = time.process_time()
    assert stated_answer("\\boxed{" * 20_000) is None
    assert stated_answer("{" + "\\boxed{" * 20_000 + "4}") == "4"
    assert time.process_time() - start < 2  # 0.1; a scan from each would take minutes


def test_mawps_answers_are_found_at_the_end_of_a_completion(shared_data):
    problems = rows(shared_data, "verify_mawps/problems.jsonl")
    judge = AnswerJudge(known_answers(problems))
    scores = judge.scores(
        [row["prompt"] for row in problems],
        [
            [f"They have {row['answer']} left.", f"They have {row['answer'] + 1}."]
            for row in problems
        ],
    )
    assert scores.mean(0).tolist() == [1, 0]
    whole = [int(row["answer"]) for row in problems if row["answer"] == int(row["answer"])]
    check_endings(whole[:300] + [row["answer"] for row in problems][-50:], random.Random(0))


@pytest.mark.slow
def test_all_gsm8k_training_solutions_give_their_answers(shared_data):
    with gzip.open(shared_data / "verify_gsm8k/train.jsonl.gz", "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    judge = AnswerJudge(known_answers(problems))
    scores = judge.scores([row["prompt"] for row in problems], [[r["solution"]] for r in problems])
    assert scores.shape == (5978, 1)
    assert scores.all()
