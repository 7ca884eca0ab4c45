"""Judges: which completion of a prompt is better, as probabilities `[B, K, K]`."""

from paxo.judges.checks import CheckedJudge, JudgeError, checked_preferences, wanted_pairs
from paxo.judges.code import (
    CodeJudge,
    CodeProblem,
    humaneval_problems,
    mbpp_problems,
    mbpp_prompt,
)
from paxo.judges.ensembles import JudgeEnsemble, RewardEnsemble
from paxo.judges.http import Endpoint, EndpointError
from paxo.judges.language_model import LanguageModelJudge, parse_verdict
from paxo.judges.matrices import MatrixJudge, cyclic_matrix
from paxo.judges.numbers import AnswerJudge, final_number, known_answers, same_answer
from paxo.judges.preference_models import EmbeddingJudge, PairModelJudge
from paxo.judges.rewards import RewardJudge, bradley_terry
from paxo.judges.rules import RuleJudge, preferences_from_scores
from paxo.judges.sandbox import Limits, Outcome, Sandbox, SandboxError

__all__ = [
    "AnswerJudge",
    "CheckedJudge",
    "CodeJudge",
    "CodeProblem",
    "EmbeddingJudge",
    "Endpoint",
    "EndpointError",
    "JudgeEnsemble",
    "JudgeError",
    "LanguageModelJudge",
    "Limits",
    "MatrixJudge",
    "Outcome",
    "PairModelJudge",
    "RewardEnsemble",
    "RewardJudge",
    "RuleJudge",
    "Sandbox",
    "SandboxError",
    "bradley_terry",
    "checked_preferences",
    "cyclic_matrix",
    "final_number",
    "humaneval_problems",
    "known_answers",
    "mbpp_problems",
    "mbpp_prompt",
    "parse_verdict",
    "preferences_from_scores",
    "same_answer",
    "wanted_pairs",
]
