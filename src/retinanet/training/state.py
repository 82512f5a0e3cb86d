"""The training state on disk: whole or not there, checked when it is read, the newest sound one first.

    checkpoints/00000812/
      network.safetensors  average.safetensors  optimizer.safetensors ...   one file a part
      state.json                                                            written last: values, and every file's hash

A state is written beside its place, flushed to the disk file by file, and moved; only then older ones go. A reader that
finds a damaged one says what is wrong with it and takes the one before. Reading executes nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.optim import Optimizer

from retinanet.errors import CheckpointError
from retinanet.folders import not_written

FORMAT_VERSION = 2
VALUES = "state.json"
# Sound states that stay when a newer one is there.
KEPT = 2
# Bytes that must be free beyond the tensors' own: headers, values, what else is written meanwhile.
MARGIN = 2**20
# A state.json is a few kilobytes.
LARGEST_VALUES = 64 * 2**20


@dataclass(frozen=True)
class State:
    """What a run needs to go on as if it had never stopped.

    Args:
        step: steps done.
        parts: part -> tensor's name -> tensor.
        values: plain values, as JSON holds them.
    """

    step: int
    parts: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any] = field(default_factory=dict)


def save_state(folder: Path, state: State) -> Path:
    """Write a state into `folder` and return its own folder; older ones but `KEPT - 1` go when it is there.

    Raises:
        DiskError: the disk has no room or refuses; what was there before is untouched.
    """
    place = folder / f"{state.step:08d}"
    if place.exists():
        try:
            read_state(place)
            return place
        except CheckpointError:
            shutil.rmtree(place)
    draft = folder / f".{place.name}.{os.getpid()}.part"
    needed = MARGIN + sum(
        t.numel() * t.element_size() for part in state.parts.values() for t in part.values()
    )
    # What a process that was killed while it saved could not take away may be all the room there is.
    _rotate(folder)
    try:
        draft.mkdir(parents=True)
        free = shutil.disk_usage(draft).free
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        files = {}
        for name, tensors in state.parts.items():
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            files[f"{name}.safetensors"] = _write(draft / f"{name}.safetensors", save(plain))
        values = {"format": FORMAT_VERSION, "step": state.step, "values": dict(state.values), "files": files}
        text = json.dumps({**values, "sha256": _digest_of(values)}, indent=1, allow_nan=False)
        _write(draft / VALUES, text.encode())
        _flush(draft)
        os.replace(draft, place)
        _flush(folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)  # before what is free is told
        raise not_written("the training state", folder, needed, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _rotate(folder)
    return place


def newest_state(folder: Path) -> tuple[State | None, list[str]]:
    """Return the newest sound state in a folder, None where there is none, and what is wrong with newer ones, which
    are put aside: they must not count among those that are kept.
    """
    damaged: list[str] = []
    aside: list[Path] = []
    for place in reversed(_places(folder)):
        try:
            state = read_state(place)
        except CheckpointError as error:
            damaged.append(str(error))
            aside.append(place)
            continue
        for other in aside:
            with suppress(OSError):
                other.rename(other.with_name(f".{other.name}.damaged"))
        return state, damaged
    return None, damaged


def read_state(place: Path) -> State:
    """Read a state's folder; every byte is checked against what was written.

    Raises:
        CheckpointError: a file is missing, cut or changed.
    """
    values = _read_values(place)
    parts = {}
    for name, written in values["files"].items():
        content = _read(place / name, written["bytes"])
        if hashlib.sha256(content).hexdigest() != written["sha256"]:
            raise CheckpointError(f"{place / name} is damaged: it is not what was written")
        try:
            parts[name.removesuffix(".safetensors")] = load(content)
        except SafetensorError as error:  # its hash is right: another version wrote it
            raise CheckpointError(f"{place / name} cannot be read: {error}") from None
    return State(values["step"], parts, values["values"])


def _looks_sound(place: Path) -> bool:
    """Return whether a state is sound as far as sizes show."""
    try:
        files = _read_values(place)["files"]
        return all((place / name).stat().st_size == written["bytes"] for name, written in files.items())
    except (CheckpointError, OSError):
        return False


def _read_values(place: Path) -> dict[str, Any]:
    file = place / VALUES
    content = _read(file, LARGEST_VALUES)
    try:
        values = json.loads(content)
        written = values.pop("sha256")
        sound = written == _digest_of(values) and "format" in values
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file} is damaged: it is not what was written")
    if values["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format {values['format']}, required is {FORMAT_VERSION}: resume with the version of "
            "retinanet that wrote it"
        )
    found: dict[str, Any] = values
    if not _is_ours(found):
        raise CheckpointError(f"{file} is no training state of retinanet")
    return found


def _is_ours(values: dict[str, Any]) -> bool:
    """Return whether the values have the form that `save_state` gives them; a hash proves nothing of a stranger's."""
    files = values.get("files")
    return (
        type(values.get("step")) is int
        and isinstance(values.get("values"), dict)
        and isinstance(files, dict)
        and all(
            re.fullmatch(r"[a-z]+\.safetensors", name)
            and isinstance(written, dict)
            and type(written.get("bytes")) is int
            and isinstance(written.get("sha256"), str)
            for name, written in files.items()
        )
    )


def _read(file: Path, limit: int) -> bytes:
    try:
        if not file.is_file():  # a pipe or a device would block or never end
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if file.stat().st_size > limit:
            raise CheckpointError(f"{file} is damaged: it has more than {limit:,} bytes")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None


def _digest_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _write(file: Path, content: bytes) -> dict[str, Any]:
    """Write a file through to the disk; return its size and hash."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _flush(folder: Path) -> None:
    """Let the disk know which files a folder holds; a system that cannot do that does it by itself."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _places(folder: Path) -> list[Path]:
    """Return the folders of states, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        place for place in folder.iterdir() if re.fullmatch(r"\d{8,}", place.name) and place.is_dir()
    )


def _rotate(folder: Path) -> None:
    """Keep the newest sound states; all that is older goes, and what killed processes and damage left."""
    places = _places(folder)
    sound = [place for place in places if _looks_sound(place)]
    for place in places[: places.index(sound[-KEPT:][0])] if sound else ():
        shutil.rmtree(place, ignore_errors=True)
    for left in (*folder.glob(".*.part"), *folder.glob(".*.damaged")):
        shutil.rmtree(left, ignore_errors=True)


def optimizer_tensors(optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Return what optimisers remember, by optimiser, parameter and name."""
    found = {}
    for number, optimizer in enumerate(optimizers):
        for place, parameter in enumerate(_parameters(optimizer)):
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{number}/{place}/{name}"] = value
                elif value is not None:
                    raise TypeError(
                        f"the optimiser keeps {name!r} as {type(value).__name__}, not as a tensor"
                    )
    return found


def restore_optimizers(optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Give fresh optimisers of the same parameters what `optimizer_tensors` returned."""
    for key, value in tensors.items():
        number, place, name = key.split("/")
        parameter = _parameters(optimizers[int(number)])[int(place)]
        if value.shape == parameter.shape:
            # In the parameter's own layout: fused steps walk over both by address.
            kept = torch.empty_like(parameter).copy_(value)
        else:  # a count of steps lies where the fused step reads it
            kept = value.to(parameter.device, copy=True)
        optimizers[int(number)].state[parameter][name] = kept


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
