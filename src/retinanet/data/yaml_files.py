"""YAML of strangers: text, lists and tables only, bounded in size and depth, without aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import yaml

from retinanet.data.rules import brief, read_bytes
from retinanet.errors import DataError

LARGEST = 2**20  # bytes
DEEPEST = 20  # lists and tables inside one another

# libyaml's parser where PyYAML was built with it, as its wheels are: 1 MB in less than a second.
_LOADER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)

Plain: TypeAlias = "str | list[Plain] | dict[str, Plain]"


def read_yaml(path: Path) -> dict[str, Plain]:
    """Return a YAML file's table. Every value stays text, so that a class may be called no, 1e3 or null.

    Stricter than `yaml.safe_load`: nothing but text, lists and tables is ever made.

    Raises:
        DataError: not a table in sound YAML, over 1 MB, nested too deeply, an alias, a key given twice.
    """
    try:
        text = read_bytes(path, limit=LARGEST).decode("utf-8-sig")
        _refuse_traps(text, path)
        node = yaml.compose(text, Loader=_LOADER)
        found = None if node is None else _plain(node, path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: needs text in UTF-8; {error}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: needs sound YAML; {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: needs `key: value` lines; got {brief(found)}")
    return found


def _refuse_traps(text: str, path: Path) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise DataError(
                f"{path}: line {line}: needs YAML without aliases, which can expand without end; "
                f"got *{event.anchor}. Write the value out"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise DataError(f"{path}: needs lists and tables at most {DEEPEST} deep; line {line} is deeper")


def _plain(node: yaml.Node, path: Path) -> Plain:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, path) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return str(node.value)
    table: dict[str, Plain] = {}
    for key, value in node.value:
        where = f"{path}: line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise DataError(f"{where}: needs a word or a number as key; got a list or table")
        if key.value in table:
            raise DataError(f"{where}: needs every key once; {brief(key.value)} is given twice")
        table[key.value] = _plain(value, path)
    return table
