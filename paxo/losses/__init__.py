"""Preference losses: pure functions of log-prob arrays, candidates on the last axis.

They know nothing of batches, models, optimisers or devices. `paxo.objectives.LOSSES` names them.
"""

from paxo.losses.contract import stateful, whole_batch
from paxo.losses.likelihood import nll_loss
from paxo.losses.pairwise import dpo_loss, ipo_loss, simpo_loss

__all__ = ["dpo_loss", "ipo_loss", "nll_loss", "simpo_loss", "stateful", "whole_batch"]
