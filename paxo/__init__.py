"""Preference optimisation of language models in JAX.

Names are loaded on first use: `import paxo` imports no jax and starts no backend.

>>> import paxo
>>> "make_train_step" in dir(paxo)
True
"""

import difflib
import importlib
from typing import Any

__version__ = "0.1.0"  # setup.py reads this line

# Public name -> the module that defines it, or the module itself.
_PUBLIC = {
    "CompletionScorer": "paxo.reward_scoring",
    "Completions": "paxo.types",
    "Experiment": "paxo.experiment",
    "HeadScorer": "paxo.reward_scoring",
    "Judge": "paxo.types",
    "LOSSES": "paxo.objectives",
    "Mean": "paxo.numerics",
    "ModelConfig": "paxo.models.config",
    "Objective": "paxo.objectives",
    "Pairing": "paxo.types",
    "Policy": "paxo.types",
    "PreferenceBatch": "paxo.types",
    "PreferenceGame": "paxo.games.preference_game",
    "PromptBatch": "paxo.types",
    "Sampler": "paxo.types",
    "Scorer": "paxo.types",
    "SettingsError": "paxo.overrides",
    "TrainState": "paxo.training.state",
    "adamw": "paxo.training.optimizers",
    "attach_logps": "paxo.scoring",
    "compile_step": "paxo.training.step",
    "data": "paxo.data",
    "evaluation": "paxo.evaluation",
    "fit": "paxo.training.loop",
    "games": "paxo.games",
    "judges": "paxo.judges",
    "losses": "paxo.losses",
    "make_beam_search": "paxo.sampling",
    "make_mixture_sampler": "paxo.sampling",
    "make_policy": "paxo.models.policy",
    "make_sampler": "paxo.sampling",
    "make_scorer": "paxo.scoring",
    "make_train_step": "paxo.training.step",
    "metrics": "paxo.metrics",
    "models": "paxo.models",
    "numerics": "paxo.numerics",
    "objective": "paxo.objectives",
    "online": "paxo.online",
    "pmap_step": "paxo.training.step",
    "sampling": "paxo.sampling",
    "sequence_logps": "paxo.scoring",
    "snapshot": "paxo.training.state",
    "token_logps": "paxo.scoring",
    "training": "paxo.training",
    "types": "paxo.types",
    "weighted_sum": "paxo.objectives",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        near = difflib.get_close_matches(name, _PUBLIC, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'paxo' has no attribute {name!r}{meant}", name=name)
    module = importlib.import_module(_PUBLIC[name])
    value = module if module.__name__ == f"paxo.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
