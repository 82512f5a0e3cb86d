"""The training state on disk: equal when read, whole or not there, damage named, the one before taken."""

import copy
import errno
import json
import os
import random
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from retinanet.errors import CheckpointError, DiskError
from retinanet.training import state as of_state
from retinanet.training.optimizer import build_optimizers, set_rate
from retinanet.training.state import (
    KEPT,
    State,
    newest_state,
    optimizer_tensors,
    read_state,
    restore_optimizers,
    save_state,
)


def a_state(step: int = 12) -> State:
    generator = torch.Generator().manual_seed(step)
    parts = {
        "network": {"a.weight": torch.randn(3, 4, generator=generator), "b": torch.tensor(7)},
        "average": {"a.weight": torch.randn(3, 4, generator=generator)},
    }
    return State(step, parts, {"best": {"ap": 0.1 + 0.2, "step": 3}, "averaged": 5})


def assert_equal(found: State, expected: State) -> None:
    assert (found.step, found.values) == (expected.step, expected.values)
    assert found.parts.keys() == expected.parts.keys()
    for name, part in expected.parts.items():
        assert found.parts[name].keys() == part.keys()
        assert all(torch.equal(found.parts[name][key], tensor) for key, tensor in part.items())


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    place = save_state(tmp_path, a_state())
    assert place == tmp_path / "00000012"
    assert_equal(read_state(place), a_state())
    found, damaged = newest_state(tmp_path)
    assert found is not None
    assert_equal(found, a_state())
    assert damaged == []
    assert newest_state(tmp_path / "nothing") == (None, [])


def test_the_newest_two_stay(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000, 20):
        save_state(tmp_path, a_state(step))
    assert sorted(os.listdir(tmp_path)) == ["00000020", "100000000"]
    assert KEPT == 2


def test_a_damaged_state_does_not_count_among_those_kept(tmp_path: Path) -> None:
    for step in (5, 10):
        save_state(tmp_path, a_state(step))
    (tmp_path / "00000010" / "network.safetensors").write_bytes(b"cut")
    save_state(tmp_path, a_state(20))
    assert sorted(os.listdir(tmp_path)) == ["00000005", "00000010", "00000020"]
    save_state(tmp_path, a_state(30))
    assert sorted(os.listdir(tmp_path)) == ["00000020", "00000030"]


def test_a_state_with_a_flipped_byte_is_put_aside_and_goes(tmp_path: Path) -> None:
    """Its sizes are right: only reading finds it out, and then it must not take the place of a sound one."""
    for step in (4, 6):
        save_state(tmp_path, a_state(step))
    file = tmp_path / "00000006" / "network.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found, damaged = newest_state(tmp_path)
    assert found is not None
    assert (found.step, len(damaged)) == (4, 1)
    assert sorted(os.listdir(tmp_path)) == [".00000006.damaged", "00000004"]
    save_state(tmp_path, a_state(5))
    assert sorted(os.listdir(tmp_path)) == ["00000004", "00000005"]


def test_a_draft_of_a_killed_process_of_the_same_number_is_no_hindrance(tmp_path: Path) -> None:
    left = tmp_path / f".00000012.{os.getpid()}.part"
    left.mkdir()
    (left / "network.safetensors").write_bytes(b"half")
    assert_equal(read_state(save_state(tmp_path, a_state())), a_state())
    assert os.listdir(tmp_path) == ["00000012"]


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../elsewhere.safetensors": {"bytes": 1, "sha256": ""}}},
        {"files": {"/dev/zero": {"bytes": 1, "sha256": ""}}},
        {"files": []},
        {"files": {"network.safetensors": {"bytes": "1", "sha256": ""}}},
        {"step": "12"},
        {"values": None},
    ],
)
def test_a_strangers_values_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    """The hash of the values is no secret: anyone can make one that fits."""
    place = save_state(tmp_path, a_state())
    values = {**json.loads((place / "state.json").read_text()), **change}
    values.pop("sha256")
    (place / "state.json").write_text(json.dumps({**values, "sha256": of_state._digest_of(values)}))
    with pytest.raises(CheckpointError, match="is no training state of retinanet"):
        read_state(place)


def test_a_longer_file_than_was_written_is_not_read(tmp_path: Path) -> None:
    place = save_state(tmp_path, a_state())
    with (place / "network.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=r"network\.safetensors is damaged: it has more than"):
        read_state(place)


def test_saving_a_step_again_keeps_a_sound_state_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    place = save_state(tmp_path, a_state())
    before = (place / "state.json").stat().st_mtime_ns
    save_state(tmp_path, a_state())
    assert (place / "state.json").stat().st_mtime_ns == before
    (place / "average.safetensors").write_bytes(b"")
    save_state(tmp_path, a_state())
    assert_equal(read_state(place), a_state())


@pytest.mark.parametrize("name", ["network.safetensors", "average.safetensors", "state.json"])
def test_every_flipped_byte_and_every_cut_is_noticed(name: str, tmp_path: Path) -> None:
    save_state(tmp_path, a_state(5))
    place = save_state(tmp_path, a_state(10))
    file = place / name
    content = file.read_bytes()
    draw = random.Random(0)
    places = draw.sample(range(len(content)), min(60, len(content)))
    for where in places:
        changed = bytearray(content)
        changed[where] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=f"{name} "):
            read_state(place)
    for length in (0, 1, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=f"{name} "):
            read_state(place)
    found, damaged = newest_state(tmp_path)
    assert found is not None
    assert found.step == 5
    assert len(damaged) == 1
    assert name in damaged[0]
    (tmp_path / "00000005" / name).unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_state(tmp_path / "00000005")


def test_white_space_is_no_content(tmp_path: Path) -> None:
    """The hash is of the values: a file that an editor formatted anew is the same state."""
    place = save_state(tmp_path, a_state())
    file = place / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4))
    assert_equal(read_state(place), a_state())


def test_another_format_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_state, "FORMAT_VERSION", 2)
    place = save_state(tmp_path, a_state())
    monkeypatch.setattr(of_state, "FORMAT_VERSION", 1)
    with pytest.raises(CheckpointError, match="has format 2, required is 1: resume with the version"):
        read_state(place)


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, a_state(5))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(DiskError) as raised:
        save_state(tmp_path, a_state(10))
    message = str(raised.value)
    assert f"no room for the training state in {tmp_path}" in message
    assert f"{2**20 + 104:,} bytes are needed, 1,000 are free" in message
    found, damaged = newest_state(tmp_path)
    assert found is not None
    assert (found.step, damaged) == (5, [])
    assert os.listdir(tmp_path) == ["00000005"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("file", range(3))
def test_a_disk_that_refuses_on_the_way_leaves_the_state_before(
    number: int, file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, a_state(5))
    write, written = of_state._write, []

    def refuse(place: Path, content: bytes) -> dict[str, object]:
        written.append(place)
        if len(written) > file:
            place.write_bytes(content[: len(content) // 2])
            raise OSError(number, os.strerror(number))
        return write(place, content)

    monkeypatch.setattr(of_state, "_write", refuse)
    with pytest.raises(DiskError, match="cannot be written to" if number == errno.EIO else "no room"):
        save_state(tmp_path, a_state(10))
    assert os.listdir(tmp_path) == ["00000005"]
    found, _ = newest_state(tmp_path)
    assert found is not None
    assert_equal(found, a_state(5))


def test_what_a_killed_process_left_is_no_state_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the disk is asked whether there is room: it may be all the room."""
    left = tmp_path / ".00000007.99999.part"
    left.mkdir()
    (left / "network.safetensors").write_bytes(b"half")
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 0 if left.exists() else 10**9))
    assert newest_state(tmp_path) == (None, [])
    save_state(tmp_path, a_state())
    assert os.listdir(tmp_path) == ["00000012"]


def test_a_file_that_was_written_so_and_is_no_safetensors_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(of_state, "save", lambda _: b"of another version")
        place = save_state(tmp_path, a_state())
    with pytest.raises(CheckpointError, match=r"\.safetensors cannot be read: "):
        read_state(place)


def test_a_disk_that_does_not_say_what_is_free_is_told_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    with pytest.raises(
        DiskError, match=r"no room for the training state in .*: 1,048,\d{3} bytes are needed$"
    ):
        save_state(tmp_path, a_state())


# ---------------------------------------------------------------------------------- optimisers


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)).relu()).square().mean()


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_optimisers_go_on_as_if_never_stopped(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Two().to(memory_format=torch.channels_last)

    def fresh(network: Two) -> list[torch.optim.Optimizer]:
        return build_optimizers(
            network, outputs=[network.last], name=name, lr=0.0, weight_decay=0.1, decay_all=False
        )

    def train(network: Two, optimizers: list[torch.optim.Optimizer], first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            network(torch.randn(2, 3, 8, 8)).backward()
            set_rate(optimizers, 0.01 / (1 + step))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    optimizers = fresh(network)
    train(network, optimizers, 0, 3)
    parts = {"network": network.state_dict(), "optimizer": optimizer_tensors(optimizers)}
    place = save_state(tmp_path, State(3, copy.deepcopy(parts)))
    train(network, optimizers, 3, 6)

    torch.manual_seed(99)
    again = Two().to(memory_format=torch.channels_last)
    read = read_state(place)
    again.load_state_dict(read.parts["network"])
    resumed = fresh(again)
    restore_optimizers(resumed, read.parts["optimizer"])
    train(again, resumed, 3, 6)
    for ours, theirs in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    before, after = optimizer_tensors(optimizers), optimizer_tensors(resumed)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any("momentum" in key or "exp_avg" in key for key in before)


def test_an_optimiser_that_keeps_something_else_is_not_saved_in_part() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["note"] = "text"
    with pytest.raises(TypeError, match="keeps 'note' as str"):
        optimizer_tensors([optimizer])
