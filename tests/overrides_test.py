"""Dotted overrides: what a flag may say, and what it is told when it is wrong."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import pytest

from paxo.overrides import SettingsError, apply_overrides, flatten, to_json


@dataclasses.dataclass(frozen=True)
class Adam:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Sgd:
    learning_rate: float = 1e-1


@dataclasses.dataclass(frozen=True)
class Rope:
    factor: float


@dataclasses.dataclass(frozen=True)
class Adapters:
    rank: int = 8
    alpha: float = 16.0


@dataclasses.dataclass(frozen=True)
class Model:
    num_heads: int = 8
    num_kv_heads: int = 4
    path: pathlib.Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    rope: Rope | None = None
    lora: Adapters | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads; got {self.num_kv_heads} and {self.num_heads}"
            )


@dataclasses.dataclass(frozen=True)
class Train:
    num_steps: int = 100
    clip: Annotated[float | None, "range"] = 1.0
    resume: bool = True
    seed: int | str = 0


class Loss:
    """A record of the objective's kind: hyper-parameters of a function, one with a dotted name."""

    def __init__(self, name: str = "dpo", **values: float):
        self.name = name
        self.hyper_parameters = {"beta": 0.1, "nll.weight": 1.0} | values

    def field_names(self) -> Mapping[str, Any]:
        return dict.fromkeys(self.hyper_parameters, float)

    def with_field(self, name: str, value: Any) -> "Loss":
        if value < 0:
            raise ValueError(f"objective 'dpo': {name} must be at least 0; got {value}")
        return Loss(self.name, **(self.hyper_parameters | {name: value}))

    @classmethod
    def named(cls, name: str) -> "Loss":
        if name not in ("dpo", "ipo"):
            raise ValueError(f"unknown objective {name!r}")
        return cls(name)


@dataclasses.dataclass(frozen=True)
class Settings:
    model: Model = Model()
    train: Train = Train()
    optimizer: Adam | Sgd = Adam()
    objective: Loss = dataclasses.field(default_factory=Loss)
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": 1, "fsdp": 1})
    evaluations: tuple[Train, ...] = (Train(), Train(num_steps=7))
    judge: Callable[[str], float] = math.exp
    stop: tuple[str, ...] = ()
    template: str = "plain"
    anything: Any = 3


def changed(*overrides: str) -> dict[str, Any]:
    """The leaves in which the settings with and without the overrides differ."""
    before, after = flatten(Settings()), flatten(apply_overrides(Settings(), overrides))
    return {name: value for name, value in after.items() if before.get(name) != value}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.num_steps=20", 20),
        ("train.num_steps=2e3", 2000),
        ("train.clip=1e-4", 1e-4),
        ("train.clip=none", None),
        ("train.resume=false", False),
        ("train.seed=12", 12),
        ("train.seed=twelve", "twelve"),
        ("model.path=/data/m=1", "/data/m=1"),
        ("model.dtype=bfloat16", "bfloat16"),
        ("optimizer.learning_rate=2", 2.0),
        ("optimizer.betas=0.8,0.9", [0.8, 0.9]),
        ("objective.beta=0.2", 0.2),
        ("objective.nll.weight=0.5", 0.5),
        ("mesh.fsdp=4", 4),
        ("evaluations.1.num_steps=9", 9),
        ("stop=a, b", ["a", "b"]),
        ("template=  two words ", "  two words "),
        ("anything=4", 4),
    ],
)
def test_a_flag_changes_the_one_leaf_it_names_and_is_read_by_its_type(override, value):
    assert changed(override) == {override.partition("=")[0]: value}
    key = override.partition("=")[0]
    assert type(changed(override)[key]) is type(value)


def test_every_leaf_of_config_json_that_is_text_or_a_number_can_be_given_back_as_a_flag():
    settings = apply_overrides(
        Settings(), ["train.num_steps=5", "objective.beta=0.3", "mesh.data=2", "model.path=x"]
    )
    nodes = ("optimizer", "objective", "judge")  # the class of a record, its name, a function
    flags = [
        f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in flatten(settings).items()
        if name not in nodes
    ]
    assert flatten(apply_overrides(Settings(), flags)) == flatten(settings)


def test_a_whole_mapping_is_replaced_and_the_last_of_two_flags_wins():
    settings = apply_overrides(Settings(), ["mesh=data:2,tensor:4", "train.seed=1", "train.seed=2"])
    assert dict(settings.mesh) == {"data": 2, "tensor": 4}
    assert settings.train.seed == 2


def test_an_optional_part_is_switched_on_by_one_of_its_settings_and_off_by_none():
    settings = apply_overrides(Settings(), ["model.lora.rank=4"])
    assert settings.model.lora == Adapters(rank=4, alpha=16.0)
    assert flatten(settings)["model.lora.alpha"] == 16.0
    off = apply_overrides(settings, ["model.lora=none"])
    assert flatten(off) == flatten(Settings())


def test_changes_that_fit_only_together_are_checked_together():
    settings = apply_overrides(Settings(), ["model.num_heads=6", "model.num_kv_heads=3"])
    assert (settings.model.num_heads, settings.model.num_kv_heads) == (6, 3)


def test_the_settings_given_are_not_changed():
    settings = Settings()
    apply_overrides(settings, ["train.num_steps=1", "mesh.data=8", "objective.beta=9"])
    assert flatten(settings) == flatten(Settings())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.num_step=20",
            "unknown setting 'train.num_step'; did you mean 'train.num_steps'? "
            "(train has: num_steps, clip, resume, seed)",
        ),
        ("trian.seed=1", "did you mean 'train.seed'? (there are: model, train, optimizer"),
        ("learning_rate=1", "did you mean 'optimizer.learning_rate'?"),
        ("objective.betta=1", "did you mean 'objective.beta'? (objective has: beta, nll.weight)"),
        ("train.seed.x=1", "train.seed is 0, with no settings of its own"),
        ("model.rope.factor=2", "model.rope is None, with no settings of its own"),
        ("model.lora.rnk=2", "did you mean 'model.lora.rank'? (model.lora has: rank, alpha)"),
        ("train.num_steps=many", "setting 'train.num_steps' wants a whole number; got 'many'"),
        ("train.num_steps=1.5", "wants a whole number; got '1.5'"),
        ("train.num_steps=nan", "wants a whole number; got 'nan'"),
        ("train.resume=1", "wants true or false; got '1'"),
        ("train.clip=tight", "wants none or a number; got 'tight'"),
        ("model.dtype=float16", "wants one of float32, bfloat16; got 'float16'"),
        ("optimizer.betas=1,2,3", "wants 2 values separated by commas; got '1,2,3'"),
        ("mesh=8", "wants name:value pairs separated by commas; got '8'"),
        ("train=fast", "it has settings of its own: train.num_steps, train.clip"),
        ("judge=log", "wants a value of type Callable, which only the experiment file can give"),
        ("train.num_steps", "given as name=value, like train.num_steps=20; got 'train.num_steps'"),
        ("model.num_heads=6", "must divide num_heads; got 4 and 6 (set by model.num_heads=6)"),
        ("objective.beta=-1", "must be at least 0; got -1.0 (set by objective.beta=-1)"),
        ("objective=ppo", "unknown objective 'ppo' (set by objective=ppo)"),
    ],
)
def test_a_wrong_flag_is_told_what_is_wrong_and_the_way_out(override, message):
    with pytest.raises(SettingsError) as caught:
        apply_overrides(Settings(), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_is_replaced_by_its_name_and_keeps_nothing_of_the_old_one():
    settings = apply_overrides(Settings(), ["objective.beta=0.7"])
    settings = apply_overrides(settings, ["objective.nll.weight=0.5", "objective=ipo"])
    assert flatten(settings)["objective"] == "ipo"
    assert settings.objective.hyper_parameters == {"beta": 0.1, "nll.weight": 0.5}


def test_a_mapping_and_one_of_its_entries_cannot_both_be_set():
    with pytest.raises(SettingsError, match=r"'mesh' cannot be set together with mesh\.data"):
        apply_overrides(Settings(), ["mesh=data:2", "mesh.data=4"])


def test_flatten_tells_which_record_stands_in_a_field_that_may_hold_several():
    flat = flatten(dataclasses.replace(Settings(), optimizer=Sgd()))
    assert flat["optimizer"] == "Sgd"
    assert flat["objective"] == "dpo"
    assert "model" not in flat


def test_json_keeps_every_value_and_has_no_bare_infinity():
    settings = dataclasses.replace(Settings(), train=Train(clip=math.inf))
    assert json.loads(to_json(settings)) == flatten(settings)
    assert flatten(settings)["train.clip"] == "inf"
    assert apply_overrides(Settings(), ["train.clip=inf"]).train.clip == math.inf
    assert flatten(settings)["judge"] == "math.exp"


def test_a_leaf_that_json_cannot_hold_is_named():
    with pytest.raises(SettingsError, match="setting 'anything' holds a value of type object"):
        to_json(dataclasses.replace(Settings(), anything=object()))
