"""The model file: safetensors whose metadata holds everything needed to use it. The only writer and loader.

Reading executes nothing. A run directory, a model directory or the file itself names a model.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from retinanet.errors import CheckpointError, ConfigError, DataError
from retinanet.folders import write_bytes
from retinanet.model import ModelSpec, RetinaNet, build_retinanet
from retinanet.records import OperatingPoints
from retinanet.version import __version__

FILE_NAME = "model.safetensors"
LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class Model:
    """A network with all that its file says of it."""

    network: RetinaNet
    spec: ModelSpec
    operating_points: OperatingPoints = field(default_factory=OperatingPoints)
    training: dict[str, Any] = field(default_factory=dict)


def save_model(path: str | Path, model: Model) -> Path:
    """Write a model into a directory (as `model.safetensors`) or to a path that ends in .safetensors.

    The file appears whole or not at all: it is written beside its place and moved there.

    Raises:
        DiskError: the disk has no room or refuses; a model that was there stays as it was.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / FILE_NAME
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    metadata = {
        "spec": json.dumps(model.spec.to_json()),
        "operating_points": json.dumps(asdict(model.operating_points)),
        "training": json.dumps(model.training),
        "versions": json.dumps({"retinanet": __version__, "torch": str(torch.__version__)}),
        "licence": LICENCE,
    }
    write_bytes(path, _ordered(save(state, metadata)), parents=True)
    return path


def _ordered(content: bytes) -> bytes:
    """Return a safetensors file with its metadata in order: the same model is the same file, whatever was hashed how.

    The file is the length of its header in 8 bytes, the header as JSON, filled up with spaces, and the tensors.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def find_model(path: str | Path) -> Path:
    """Return the model file that a run directory, model directory or file stands for.

    A run's best model comes before its last.
    """
    path = Path(path)
    if path.is_file():
        return path
    places = [path / "best" / FILE_NAME, path / "last" / FILE_NAME, path / FILE_NAME]
    for place in places:
        if place.is_file():
            return place
    if path.is_dir():
        raise CheckpointError(
            f"a model needs {FILE_NAME} in the directory, or in its best/ or last/; {path} has none of them"
        )
    raise CheckpointError(
        f"a model needs a run directory, model directory or .safetensors file; {path} does not exist"
    )


def load_model(path: str | Path) -> Model:
    """Read a model; every tensor of the spec must be there with its shape, and nothing else."""
    file = find_model(path)
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"a model needs a safetensors file written by retinanet; {file} cannot be read as one: {error}"
        ) from None
    if "spec" not in metadata:
        raise CheckpointError(
            f"a model needs a safetensors file written by retinanet; {file} holds weights without a spec"
        )
    try:
        spec = ModelSpec.from_json(json.loads(metadata["spec"]))
        points = OperatingPoints(**json.loads(metadata.get("operating_points", "{}")))
        training = json.loads(metadata.get("training", "{}"))
    except (ConfigError, DataError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the metadata of {file} is damaged: {error}") from None
    return Model(_network_of(spec, state, file), spec, points, training)


def _network_of(spec: ModelSpec, state: dict[str, Tensor], file: Path) -> RetinaNet:
    # Without memory: initial weights would be drawn for nothing, and take longer than reading these.
    with torch.device("meta"):
        network = build_retinanet(spec)
    wanted = network.state_dict()
    _check_state(wanted, state, file)
    if any(name not in wanted for name, _ in network.named_buffers()):
        # Some networks compute buffers that no file holds, the kernel of a blur for instance.
        with torch.random.fork_rng(devices=[]):
            network = build_retinanet(spec)
    # Copied, because what was read may be a map of the file, which others can cut short.
    copied = {name: state[name].to(like.dtype, copy=True) for name, like in wanted.items()}
    network.load_state_dict(copied, assign=True)
    return network


def _check_state(wanted: dict[str, Tensor], state: dict[str, Tensor], file: Path) -> None:
    for name in (*(wanted.keys() - state.keys()), *(state.keys() - wanted.keys())):
        what = "lacks" if name in wanted else "holds an unknown tensor"
        raise CheckpointError(f"the model's spec and weights do not fit: {file} {what} {name!r}")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"the model's spec and weights do not fit: in {file} {name!r} has shape "
                f"{list(state[name].shape)}, the spec says {list(tensor.shape)}"
            )
