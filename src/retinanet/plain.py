"""Plain values (what JSON and YAML hold) into frozen dataclasses, checked field by field."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from retinanet.errors import ConfigError, did_you_mean

T = TypeVar("T")


def from_plain(kind: type[T], values: dict[str, Any], where: str) -> T:
    """Build a dataclass from an object of plain values; lists become tuples, whole numbers floats.

    An unknown or missing field and a value of another kind are errors that name the field.
    """
    built: T = _value(kind, values, where)
    return built


def _value(kind: Any, value: Any, where: str) -> Any:
    """Turn JSON values into the dataclass, tuple or plain type that a field declares."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} needs an object; got {value!r}")
        hints = typing.get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        for name in value:
            if name not in known:
                raise ConfigError(f"{where} has no field {name!r}.{did_you_mean(name, known)}")
        missing = [
            f.name
            for f in dataclasses.fields(kind)
            if f.name not in value and f.default is f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{where} needs the field {missing[0]!r}, which is absent")
        arguments = {name: _value(hints[name], item, f"{where}.{name}") for name, item in value.items()}
        return kind(**arguments)  # type: ignore[operator]  # is_dataclass admits instances too
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        for choice in typing.get_args(kind):
            try:
                return _value(choice, value, where)
            except ConfigError:
                continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        of = typing.get_args(kind)
        inner = [of[0]] * len(value) if of[-1] is Ellipsis else of
        if len(inner) == len(value):
            return tuple(_value(one, item, where) for one, item in zip(inner, value, strict=True))
    elif origin is Literal:
        if value in typing.get_args(kind):
            return value
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif type(value) is kind or (value is None and kind is types.NoneType):
        return value
    raise ConfigError(f"{where} needs {_in_words(kind)}; got {value!r}")


def _in_words(kind: Any) -> str:
    """Return how a person says a field's type: "one of sgd, adamw", "a number, nothing"."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_in_words(choice) for choice in typing.get_args(kind))
    if origin is Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if origin is tuple:
        return "a list"
    words = {float: "a number (such as 0.001)", int: "a whole number", str: "text", bool: "true or false"}
    return words.get(kind, "nothing" if kind is types.NoneType else "an object")
