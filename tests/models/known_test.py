"""Shapes of published models."""

import math

import jax
import pytest

from paxo.models.known import KNOWN, known_config
from paxo.models.policy import param_shapes

# As the model cards on the hub count them.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama3-1b": 1_235_814_400,
    "llama3-3b": 3_212_749_824,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "tinyllama-1.1b": 1_100_048_384,
}


def test_every_known_shape_has_as_many_parameters_as_its_model():
    counted = {
        name: sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(config)))
        for name, config in KNOWN.items()
    }
    assert counted == PUBLISHED


def test_an_unknown_name_is_refused_and_the_nearest_told():
    with pytest.raises(ValueError, match="unknown model 'lama3-8b'; did you mean 'llama3-8b'"):
        known_config("lama3-8b")
