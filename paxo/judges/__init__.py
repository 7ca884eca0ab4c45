"""Judges: which completion of a prompt is better, as probabilities `[B, K, K]`."""

from paxo.judges.rules import RuleJudge, preferences_from_scores

__all__ = ["RuleJudge", "preferences_from_scores"]
