"""Parquet and Arrow files as Hugging Face keeps data sets in: which hold which split, their rows and class names."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from retinanet.data.collecting import clean_name
from retinanet.data.rules import brief, read_bytes
from retinanet.errors import DataError, MissingExtraError

LARGEST_GROUP = 2**32  # bytes of one row group, as its header says
ROWS_AT_ONCE = 32
LARGEST_JSON = 2**26


def hugging_face_splits(source: Path) -> dict[str, tuple[Path, ...]]:
    """Return the data files of each split; "" is a set without splits; none where `source` is no such data set."""
    if source.is_file():
        return {"": (source,)} if source.suffix.lower() == ".parquet" else {}
    if (source / "dataset_dict.json").is_file():
        listed = _json(source / "dataset_dict.json").get("splits")
        names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
        return {name: _arrow_files(source / clean_name(name, source, str(source))) for name in names}
    if (source / "state.json").is_file():
        return {"": _arrow_files(source)}
    found: dict[str, list[Path]] = {}
    for path in sorted(
        [*source.glob("*.parquet"), *source.glob("*/*.parquet"), *source.glob("*/*/*.parquet")]
    ):
        found.setdefault(_split_of(path, source), []).append(path)
    if len(found) > 1:  # what stands beside named splits is a split of its own name
        for path in found.pop("", []):
            found.setdefault(path.stem, []).append(path)
    return {name: tuple(paths) for name, paths in found.items()}


def _split_of(path: Path, source: Path) -> str:
    """Return the split in a file's name, `train-00000-of-00002.parquet`, or in that of its folder."""
    usual = r"(train|validation|valid|val|test)"
    if named := re.match(rf"{usual}\b|(\w+)-\d+-of-\d+", path.name):
        return named[1] or named[2]
    inside = path.parent.name if path.parent != source else ""
    return inside if re.fullmatch(usual, inside) else ""


def _arrow_files(folder: Path) -> tuple[Path, ...]:
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: holds a selection of rows; call flatten_indices() before save_to_disk")
    listed = state.get("_data_files")
    names = (
        [item.get("filename") for item in listed if isinstance(item, dict)]
        if isinstance(listed, list)
        else []
    )
    where = f"{folder / 'state.json'}: _data_files"
    return tuple(folder / clean_name(name if isinstance(name, str) else "", folder, where) for name in names)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(path, limit=LARGEST_JSON))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: needs JSON; {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: needs a JSON object; got {brief(found)}")
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtraError("pyarrow", "parquet") from None


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return DataError(f"{path}: needs a sound parquet or Arrow file; {reason}")


def read_batches(path: Path, columns: Callable[[Sequence[str]], list[str]]) -> Iterator[dict[str, list[Any]]]:
    """Yield some rows at a time, as lists by column; whatever pyarrow raises on hostile bytes is a `DataError`."""
    arrow, parquet = _import("pyarrow"), _import("pyarrow.parquet")
    try:
        if path.suffix.lower() == ".parquet":
            file = parquet.ParquetFile(path)
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            if any(group.total_byte_size > LARGEST_GROUP for group in groups):
                raise DataError(f"{path}: needs row groups below 4 GiB; write it with smaller ones")
            wanted = columns(file.schema_arrow.names)
            batches = file.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted)
        else:
            batches = arrow.ipc.open_stream(arrow.memory_map(str(path)))
            wanted = columns(batches.schema.names)
        for batch in batches:
            batch.validate(full=True)
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                part = batch.slice(start, ROWS_AT_ONCE)
                yield {name: part.column(name).to_pylist() for name in wanted}
    except DataError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error


def read_class_names(path: Path, keys: Sequence[str]) -> list[str] | None:
    """Return the class names in the features that `datasets` writes into its files, None where there are none."""
    arrow, parquet = _import("pyarrow"), _import("pyarrow.parquet")
    try:
        if path.suffix.lower() == ".parquet":
            schema = parquet.read_schema(path)
        else:
            schema = arrow.ipc.open_stream(arrow.memory_map(str(path))).schema
        text = (schema.metadata or {}).get(b"huggingface", b"null")
        document = json.loads(text) if len(text) <= LARGEST_JSON else None
    except (ValueError, RecursionError):
        return None
    except Exception as error:
        raise _damaged(path, error) from error
    for key in ("info", "features", "objects"):
        document = document.get(key) if isinstance(document, dict) else None
    return next((names for key in keys for names in _names_under(document, key)), None)


def _names_under(node: Any, key: str, inside: bool = False, depth: int = 0) -> Iterator[list[str]]:
    """Yield the lists `names` of text that stand at or below a key."""
    if depth > 8:
        return
    if isinstance(node, dict):
        names = node.get("names")
        if inside and isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            yield names
        for name, inner in node.items():
            yield from _names_under(inner, key, inside or name == key, depth + 1)
    elif isinstance(node, list):
        for inner in node[:100]:
            yield from _names_under(inner, key, inside, depth + 1)
