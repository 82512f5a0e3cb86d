"""What was typed, checked before tyro reads it: a mistake gets one line in the form of all our messages."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal

import tyro

from retinanet.errors import ConfigError, did_you_mean
from retinanet.training.hints import option


def command_of(commands: Mapping[str, Any], given: Sequence[str], parent: str = "") -> str:
    """Return the name of the command that the first argument asks for."""
    word = given[0] if given else ""
    if word in commands:
        return word
    came = f"got {word!r}" if word else "none was given"
    advice = did_you_mean(word, commands) or _see(parent)
    raise ConfigError(f"a command is required: {', '.join(commands)}; {came}.{advice}")


def in_order(command: str, kind: type, given: Sequence[str], known: Collection[str] = ()) -> list[str]:
    """Return the arguments of a command with its options first, so that they may be typed in any order.

    Args:
        command: its name, for messages.
        kind: the dataclass of its options.
        known: fields that have a value without the arguments.

    Raises:
        ConfigError: an unknown option, a value that is not of its kind, an argument missing or too many.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    positional = {name: _kind(hint) for name, hint in hints.items() if _is_positional(hint)}
    kinds = {option(name): _kind(hint) for name, hint in hints.items() if name not in positional}
    options: dict[str, str] = {}
    places: list[str] = []
    rest = list(given)
    while rest:
        word = rest.pop(0)
        if word == "--":  # nothing behind it is an option
            places += rest
            break
        if not word.startswith("-") or word == "-":
            places.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name not in kinds:
            raise ConfigError(f"{command} has no option {name}.{did_you_mean(name, kinds) or _see(command)}")
        if kinds[name] is bool:
            if equals:
                raise ConfigError(f"{name} takes no value; got {value!r}")
            options[name] = name
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{name} needs {_in_words(kinds[name])}; nothing was given")
            value = rest.pop(0)
        _check(name, kinds[name], value)
        options[name] = f"{name}={value}"

    single = [name for name, of in positional.items() if typing.get_origin(of) is not tuple]
    if len(places) > len(single) == len(positional):
        wanted = f"no more than {' '.join(single).upper()}" if single else "options only"
        raise ConfigError(f"{command} takes {wanted}; got {places[len(single)]!r} as well")
    given_names = {*known, *single[: len(places)], *(name[2:].replace("-", "_") for name in options)}
    for field in fields(kind):
        required = field.default is field.default_factory is MISSING
        if (
            required
            and field.name not in given_names
            and (field.name in single or field.name not in positional)
        ):
            missing = field.name.upper() if field.name in single else option(field.name)
            raise ConfigError(f"{command} needs {missing}; none was given.{_see(command)}")
    return [*options.values(), *(["--", *places] if places else [])]


def _check(name: str, kind: Any, value: str) -> None:
    if any(_is_of(one, value) for one in _members(kind)):
        return
    guess = did_you_mean(value, typing.get_args(kind)) if typing.get_origin(kind) is Literal else ""
    raise ConfigError(f"{name} needs {_in_words(kind)}; got {value!r}" + (guess and "." + guess))


def _is_of(kind: Any, value: str) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind in (int, float):
        try:
            kind(value)
        except ValueError:
            return False
    return True


def _in_words(kind: Any) -> str:
    if len(_members(kind)) > 1:
        return " or ".join(map(_in_words, _members(kind)))
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    return {int: "a whole number", float: "a number"}.get(kind, "a value")


def _kind(hint: Any) -> Any:
    """Return a field's type without its annotations and without None."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return typing.Union[tuple(one for one in _members(hint) if one is not types.NoneType)]  # noqa: UP007


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union; any other type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _is_positional(hint: Any) -> bool:
    return tyro.conf.Positional in getattr(hint, "__metadata__", ())


def _see(command: str) -> str:
    return f" See `{' '.join(['retinanet', *command.split()])} --help`"
