"""Typed dotted overrides of nested frozen settings: `--set train.num_steps=20`.

Settings are a tree. Its inner nodes are dataclasses, `Record`s, mappings, and tuples that hold such
nodes; everything else is a leaf. `flatten` names every leaf by its dotted path, `apply_overrides`
changes leaves by the same names: a line of a run's config.json can be given back as a flag.

>>> @dataclasses.dataclass(frozen=True)
... class Train:
...     num_steps: int = 100
...     clip: float | None = None
>>> @dataclasses.dataclass(frozen=True)
... class Settings:
...     train: Train = Train()
>>> settings = apply_overrides(Settings(), ["train.num_steps=20", "train.clip=1e-1"])
>>> flatten(settings)
{'train.num_steps': 20, 'train.clip': 0.1}
>>> apply_overrides(settings, ["train.num_step=20"])
Traceback (most recent call last):
paxo.overrides.SettingsError: unknown setting 'train.num_step'; did you mean
'train.num_steps'? (train has: num_steps, clip)
"""

import collections.abc
import dataclasses
import difflib
import functools
import json
import math
import os
import pathlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

S = TypeVar("S")


class SettingsError(ValueError):
    """A setting that does not exist, or a value that it cannot take."""


@runtime_checkable
class Record(Protocol):
    """Settings that are not a plain dataclass: an objective with its losses' hyper-parameters.

    A record is immutable. The protocol need not be subclassed.

    Attributes:
        name: which record it is (`dpo`), the entry in config.json under the field that holds it.
        hyper_parameters: name -> value. A name may hold dots (`dpo.beta` of a weighted sum).
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def hyper_parameters(self) -> Mapping[str, Any]: ...  # noqa: D102

    def field_names(self) -> Mapping[str, Any]:
        """The hyper-parameters that a flag may set, each with its type as an annotation."""
        ...

    def with_field(self, name: str, value: Any) -> Any:
        """A copy with one hyper-parameter replaced; ValueError where it is out of range."""
        ...

    @classmethod
    def named(cls, name: str) -> Any:
        """The record that has this `name`, with its defaults; ValueError where there is none."""
        ...


def apply_overrides(settings: S, overrides: Iterable[str]) -> S:
    """`settings` with the fields named by `overrides` replaced; of two for one field the last wins.

    All changes of one dataclass are made at once, so that its `__post_init__` checks them together.

    Args:
        settings: a frozen dataclass or `Record`.
        overrides: texts `a.b=value`. The field's annotation says how the value is read: numbers
            (`20`, `1e-4`), `true` or `false`, text, paths, a choice of a Literal or Enum, `none`
            where the field is Optional, `1,2,3` for tuples, `data:2,fsdp:4` for mappings. The
            name of a record stands for that record with its defaults (`objective=ipo`), beside
            which its own settings may be given (`objective.tau=0.2`). A setting of an Optional
            dataclass that is None starts from its defaults, if it has them all.

    Raises:
        SettingsError: on an unknown name (naming the nearest), on a value of the wrong type (naming
            the right one), and on a value that the settings' own checks refuse.
    """
    flags = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise SettingsError(
                f"a setting is given as name=value, like train.num_steps=20; got {override!r}"
            )
        flags[key] = _Flag(key, text)
    return _rebuilt(_Field(type(settings), settings), flags, settings)


def flatten(settings: Any) -> dict[str, Any]:
    """Every leaf by its dotted name, as a value that JSON can hold.

    Where a field may hold records of several classes, an entry under its own name tells which.

    Raises:
        SettingsError: on a leaf that JSON cannot hold, such as an array or an open file.
    """
    return {
        name: _json_value(name, value)
        for name, value in _leaves("", _Field(type(settings), settings))
    }


def to_json(settings: Any) -> str:
    """The text of config.json: `flatten(settings)`, one leaf a line."""
    return json.dumps(flatten(settings), indent=2, ensure_ascii=False) + "\n"


class _Field(NamedTuple):
    annotation: Any
    value: Any


class _Flag(NamedTuple):
    key: str
    text: str


def _children(field: _Field) -> dict[str, _Field] | None:
    """The fields of an inner node by name; None for a leaf."""
    node = field.value
    if isinstance(node, type):
        return None
    if isinstance(node, Record):
        values = node.hyper_parameters
        return {name: _Field(kind, values[name]) for name, kind in node.field_names().items()}
    if dataclasses.is_dataclass(node):
        kinds = typing.get_type_hints(type(node), include_extras=True)
        names = [f.name for f in dataclasses.fields(node) if f.init]
        return {name: _Field(kinds[name], getattr(node, name)) for name in names}
    if isinstance(node, Mapping) and node:
        kind = _arguments(field, collections.abc.Mapping)[-1]
        return {str(name): _Field(kind, value) for name, value in node.items()}
    if type(node) is tuple:
        kinds = _arguments(field, collections.abc.Sequence)
        kinds += kinds[-1:] * len(node)
        fields = {str(i): _Field(kind, value) for i, (kind, value) in enumerate(zip(kinds, node))}
        return fields if any(_children(child) is not None for child in fields.values()) else None
    return None


def _arguments(field: _Field, container: type) -> list[Any]:
    """The declared types inside a mapping or tuple, or `Any`."""
    for kind in _union_members(field.annotation):
        origin = typing.get_origin(kind)
        if isinstance(origin, type) and issubclass(origin, container):
            return [argument for argument in typing.get_args(kind) if argument is not Ellipsis]
    return [Any]


def _leaves(name: str, field: _Field) -> Iterator[tuple[str, Any]]:
    fields = _children(field)
    if fields is None:
        yield name, field.value
        return
    alternatives = [kind for kind in _union_members(field.annotation) if kind is not type(None)]
    if isinstance(field.value, Record):
        yield name, field.value.name
    elif dataclasses.is_dataclass(field.value) and alternatives != [type(field.value)]:
        yield name, type(field.value).__qualname__
    for child, child_field in fields.items():
        yield from _leaves(f"{name}.{child}" if name else child, child_field)


def _rebuilt(field: _Field, flags: Mapping[str, _Flag], settings: Any) -> Any:
    """A node with the flags applied to it; they stand under their names relative to the node."""
    fields = _children(field) or {}
    new, left = {}, dict(flags)
    for name, child in fields.items():
        own = left.pop(name, None)
        below = [rest for rest in left if rest.startswith(f"{name}.")]
        inner = {rest.removeprefix(f"{name}."): left.pop(rest) for rest in below}
        if own and isinstance(child.value, Record):  # another record, then its own settings
            child, own = child._replace(value=_named(own, child.value)), None
            new[name] = child.value
        if own and inner:
            others = ", ".join(flag.key for flag in inner.values())
            raise SettingsError(f"{own.key!r} cannot be set together with {others}")
        if own:
            new[name] = _parse(own, child)
        elif inner:
            new[name] = _rebuilt(_switched_on(child), inner, settings)
    for rest, flag in left.items():
        raise SettingsError(_unknown(flag.key, rest, field.value, list(fields), settings))
    try:
        return _replace(field.value, new)
    except (ValueError, TypeError) as error:
        given = ", ".join(f"{flag.key}={flag.text}" for flag in flags.values())
        raise SettingsError(f"{error} (set by {given})") from error


def _switched_on(field: _Field) -> _Field:
    """Of a field that is None, the dataclass that it may hold, where that needs no arguments."""
    kinds = [kind for kind in _union_members(field.annotation) if dataclasses.is_dataclass(kind)]
    if field.value is not None or len(kinds) != 1:
        return field
    missing = dataclasses.MISSING
    fields = [f for f in dataclasses.fields(kinds[0]) if f.init]
    needed = [f for f in fields if f.default is missing and f.default_factory is missing]
    return field if needed else field._replace(value=kinds[0]())


def _named(flag: _Flag, record: Record) -> Any:
    try:
        return type(record).named(flag.text)
    except ValueError as error:
        raise SettingsError(f"{error} (set by {flag.key}={flag.text})") from error


def _replace(node: Any, new: Mapping[str, Any]) -> Any:
    if isinstance(node, Record):
        return functools.reduce(lambda record, item: record.with_field(*item), new.items(), node)
    if dataclasses.is_dataclass(node):
        return dataclasses.replace(node, **new)
    if isinstance(node, Mapping):
        return {name: new.get(str(name), value) for name, value in node.items()}
    return tuple(new.get(str(index), value) for index, value in enumerate(node))


def _unknown(key: str, rest: str, node: Any, siblings: list[str], settings: Any) -> str:
    prefix = key.removesuffix(rest)
    if not siblings:
        return f"unknown setting {key!r}: {prefix[:-1]} is {node!r}, with no settings of its own"
    known = [name for name, _ in _leaves("", _Field(type(settings), settings))]
    first, dot, more = rest.partition(".")
    guesses = [prefix + name + dot + more for name in difflib.get_close_matches(first, siblings)]
    guesses += [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    guesses += difflib.get_close_matches(key, known)
    meant = f"; did you mean {guesses[0]!r}?" if guesses else ""
    where = f"{prefix[:-1]} has" if prefix else "there are"
    return f"unknown setting {key!r}{meant} ({where}: {', '.join(siblings)})"


def _parse(flag: _Flag, field: _Field) -> Any:
    kind = _guessed_kind(field.value) if field.annotation is Any else field.annotation
    try:
        return _read(kind, flag.text)
    except _Wanted as wanted:
        inner = ", ".join(f"{flag.key}.{name}" for name in _children(field) or ())
        way_out = f"; it has settings of its own: {inner}" if inner else ""
        message = f"setting {flag.key!r} wants {wanted}; got {flag.text!r}{way_out}"
        raise SettingsError(message) from None


class _Wanted(Exception):
    """Says what would have been read."""


def _read(kind: Any, text: str) -> Any:
    """The value of type `kind` that `text` denotes; raises _Wanted where it denotes none."""
    members = _union_members(kind)
    if len(members) > 1:
        return _read_union(members, text)
    kind, origin, arguments = members[0], typing.get_origin(members[0]), typing.get_args(members[0])
    container = origin or kind
    if origin is Literal:
        return _choice(text, {str(choice): choice for choice in arguments})
    if container in (tuple, collections.abc.Sequence):
        return _read_tuple(arguments, text)
    if isinstance(container, type) and issubclass(container, Mapping):
        return _read_mapping(arguments[1] if arguments else str, text)
    reader, wanted = _READERS.get(
        kind, (None, f"a value of type {getattr(kind, '__name__', kind)}")
    )
    if reader is None:
        raise _Wanted(f"{wanted}, which only the experiment file can give")
    try:
        return reader(text)
    except (ValueError, KeyError):
        raise _Wanted(wanted) from None


def _union_members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a type; None first, and text, which takes anything, last."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _union_members(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        order = {type(None): 0, str: 2}
        return tuple(sorted(typing.get_args(kind), key=lambda member: order.get(member, 1)))
    return (kind,)


def _guessed_kind(value: Any) -> Any:
    """The type of a field declared as `Any`: that of its present value."""
    if type(value) is tuple:
        return tuple[type(value[0]) if value else str, ...]
    return type(value)


def _read_union(members: tuple[Any, ...], text: str) -> Any:
    wanted = []
    for member in members:
        try:
            return _read(member, text)
        except _Wanted as error:
            wanted.append(str(error))
    raise _Wanted(" or ".join(wanted))


def _read_tuple(kinds: tuple[Any, ...], text: str) -> tuple[Any, ...]:
    parts = _parts(text)
    if kinds[1:] in ((), (Ellipsis,)):
        kinds = kinds[:1] * len(parts)
    if len(parts) != len(kinds):
        raise _Wanted(f"{len(kinds)} values separated by commas")
    return tuple(_read(kind, part) for kind, part in zip(kinds, parts))


def _read_mapping(kind: Any, text: str) -> dict[str, Any]:
    pairs = [part.partition(":") for part in _parts(text)]
    if not all(colon for _, colon, _ in pairs):
        raise _Wanted("name:value pairs separated by commas")
    return {name.strip(): _read(kind, value.strip()) for name, _, value in pairs}


def _parts(text: str) -> list[str]:
    text = text[1:-1] if text[:1] + text[-1:] in ("()", "[]", "{}") else text
    parts = [part.strip() for part in text.split(",")]
    return parts[:-1] if parts[-1] == "" else parts


def _choice(text: str, choices: Mapping[str, Any]) -> Any:
    if text not in choices:
        raise _Wanted(f"one of {', '.join(choices)}")
    return choices[text]


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 2e3 is a whole number too
        if not number.is_integer():
            raise
        return int(number)


_READERS = {
    type(None): (lambda text: {"none": None, "null": None}[text.lower()], "none"),
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    int: (_whole_number, "a whole number"),
    float: (float, "a number"),
    str: (str, "text"),
    pathlib.Path: (pathlib.Path, "a path"),
}


def _json_value(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no inf
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple | list):
        return [_json_value(name, element) for element in value]
    if isinstance(value, Mapping):
        return {str(key): _json_value(name, element) for key, element in value.items()}
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    raise SettingsError(
        f"setting {name!r} holds a value of type {type(value).__name__}, which config.json cannot "
        "hold; give a number, text or a frozen dataclass from which the run builds it"
    )
