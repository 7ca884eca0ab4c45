"""Completions of prompts: random draws, mixtures of two policies, beams, choice by reward."""

from paxo.sampling.beams import BeamConfig, BeamResult, make_beam_search
from paxo.sampling.decoding import Stops
from paxo.sampling.distribution import draw, filtered, greedy
from paxo.sampling.sampler import SamplingConfig, make_mixture_sampler, make_sampler
from paxo.sampling.selection import (
    Accepted,
    best_of_n,
    distinct,
    finish_shares,
    rejection_sample,
    take_candidates,
)

__all__ = [
    "Accepted",
    "BeamConfig",
    "BeamResult",
    "SamplingConfig",
    "Stops",
    "best_of_n",
    "distinct",
    "draw",
    "filtered",
    "finish_shares",
    "greedy",
    "make_beam_search",
    "make_mixture_sampler",
    "make_sampler",
    "rejection_sample",
    "take_candidates",
]
