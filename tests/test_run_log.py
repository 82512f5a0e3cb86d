"""What a run leaves in its folder: the same log whenever it was saved and stopped; what a full disk makes of it."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from retinanet.cli.main import main
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import DiskError, Stopped
from retinanet.folders import not_written, write_bytes, write_json
from retinanet.processes import ALONE
from retinanet.training import loop
from retinanet.training.configuration import TrainingOptions
from retinanet.training.folder import RunFolder
from retinanet.training.planning import plan_run
from retinanet.training.preparation import open_splits
from retinanet.training.run import resume_training, run_training
from retinanet.training.skipping import UnreadableImages
from retinanet.training.state import newest_state
from test_resume import TINY, quiet, stop_at, terminate


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which one for training cannot be read."""
    folder = generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", train=6, val=2, spec=ShapesSpec(image_size=96)
    )
    sorted((folder / "images" / "train").iterdir())[1].write_bytes(b"no image")
    return folder


def options_of(data: Path, run: Path, **more: Any) -> TrainingOptions:
    return TrainingOptions(data=str(data), output=str(run), **{**TINY, **more})


# ------------------------------------------------------------------------------------- the log


def told(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a log without what is measured in seconds: all the rest is to be the same."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("seconds_", "images_per_"))} for line in lines
    ]


@pytest.mark.usefixtures("undrawn")
def test_the_log_does_not_depend_on_when_states_are_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on memory, of which no two processes hold the same; and no image is forgotten where a run stops before it
    has told of it."""
    monkeypatch.setattr(loop, "LOG_EVERY", 4)
    more = {"deterministic": True, "steps": 5, "validate_every_steps": 5}
    whole, saving, stopped = (tmp_path / name for name in ("whole", "saving", "stopped"))
    run_training(options_of(data, whole, **more), quiet())
    run_training(options_of(data, saving, save_every_steps=1, **more), quiet())
    with monkeypatch.context() as patch:
        stop_at(3, patch, terminate)  # an epoch: every image was asked for
        with pytest.raises(Stopped):
            run_training(options_of(data, stopped, **more), quiet())
    state, _ = newest_state(stopped / "checkpoints")
    assert state is not None
    assert len(state.values["unreadable_untold"]) == 1
    resume_training(stopped, quiet())
    lines = told(whole)
    assert [(line["step"], [*line][2]) for line in lines] == [
        (4, "unreadable"),
        (4, "loss"),
        (5, "loss"),
        (5, "ap"),
    ]
    assert told(saving) == told(stopped) == lines
    memory = RunFolder(whole).memory()
    assert all(line["memory_gb"] > 0 for line in memory)
    assert bool(memory) == Path("/proc").exists()


def test_what_another_process_found_is_told_once() -> None:
    class Two(type(ALONE)):  # type: ignore[misc]
        def gathered(self, value: set[str]) -> list[set[str]]:
            return [value, {"b", "a"}]

    images = UnreadableImages(Two(0, 2))
    images.note(["c", "a", "c"])
    images.share()
    assert images.untold == {"a", "b", "c"}
    assert images.take() == ["a", "b", "c"]
    images.note(["c"])
    assert images.take() == []


def test_what_is_made_again_is_taken_out_of_the_story(tmp_path: Path) -> None:
    """A run that fell back to an older state has not gone on at the later one."""
    folder = RunFolder(tmp_path)
    folder.forget_after(3)  # nothing is there
    assert list(tmp_path.iterdir()) == []
    for step in (10, 20, 30):
        folder.log({"step": step})
        folder.note_resume(step)
    folder.forget_after(20)
    assert [record["step"] for record in folder.history()] == [10, 20]
    assert [record["step"] for record in folder.resumes()] == [10, 20]


# ------------------------------------------------------------------------------------- the plan


def test_a_resumed_run_has_the_reasons_that_it_began_with(data: Path, tmp_path: Path) -> None:
    train, _ = open_splits(str(data))
    plan = plan_run(options_of(data, tmp_path / "run"), train)
    value = {setting: value for setting, value, _ in plan.reasons}
    begun = [
        ["classes", "disk kept", "by name"],  # known where the model to start from was read
        ["batch size", value["batch size"], "auto: of images of 64 x 64 with 3 boxes ..."],
        ["steps", value["steps"], "fit into the 20 s left"],
        ["device", "cuda:3, fp32", "what there was"],
        ["processes", "2, with 1 images of a step each", "torchrun"],
    ]
    again = plan.as_begun({**json.loads(json.dumps(plan.to_json())), "reasons": begun})
    rows = {setting: (value, why) for setting, value, why in again.reasons}
    assert rows["classes"] == ("disk kept", "by name")
    assert rows["batch size"] == (value["batch size"], "auto: of images of 64 x 64 with 3 boxes ...")
    assert rows["steps"] == (value["steps"], "fit into the 20 s left")
    assert rows["device"][0].startswith("cpu")
    assert rows.keys() == {"classes", *value}


# ------------------------------------------------------------------------------------- a full disk


@contextmanager
def full_for(name: str, monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSPC) -> Iterator[None]:
    """Let the disk have no room for a file when it is flushed."""
    flush = os.fsync

    def refusing(handle: int) -> None:
        if f"{Path(os.readlink(f'/proc/self/fd/{handle}')).name.lstrip('.')}.".startswith(f"{name}."):
            raise OSError(number, os.strerror(number))
        flush(handle)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refusing)
        yield


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc tells which file is flushed")
def test_a_full_disk_says_path_and_bytes_and_how_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever file of a run it has no room for; and what was saved before is enough to go on."""
    run = tmp_path / "run"
    bytes = r"[\d,]+ bytes are needed, [\d,]+ are free"
    stays = r"What was saved before is untouched: free space, or mend the disk, and"
    with full_for("plan.json", monkeypatch), pytest.raises(DiskError, match=f"{stays} start the run again$"):
        run_training(options_of(data, run), quiet())
    assert not run.exists()

    def refuses(name: str) -> pytest.RaisesExc[DiskError]:
        how = rf"{stays} go on with: retinanet train --resume {run}$"
        return pytest.raises(DiskError, match=rf"^no room for {re.escape(name)} in {run}: {bytes}\. {how}")

    with full_for("metrics.jsonl", monkeypatch), refuses("metrics.jsonl"):
        run_training(options_of(data, run, steps=4), quiet())
    assert f"no room for metrics.jsonl in {run}" in (run / "report.html").read_text()
    with full_for("metrics.json", monkeypatch), pytest.raises(SystemExit) as stop:
        main(["train", "--resume", str(run)])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"retinanet: no room for metrics.json in {run}: ")
    assert "--output" not in said
    for name in ("curves.png", "pictures.png"):
        with full_for(name, monkeypatch), refuses(name):
            resume_training(run, quiet())
    assert [[*line][2] for line in told(run)] == ["unreadable", "loss", "ap"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc tells which file is flushed")
def test_a_disk_that_is_full_before_a_run_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TrainingOptions(data="data", output=str(tmp_path / "run"))
    advice = r"no room for config\.yaml in .*Free space, or mend the disk, and start the run again"
    with full_for("config.yaml", monkeypatch), pytest.raises(DiskError, match=advice):
        RunFolder.create(options.output, options)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "runs"
    full = not_written(
        "x.json", there, 1234, OSError(errno.ENOSPC, "no")
    )  # of a folder that is not there yet
    assert str(full).startswith(f"no room for x.json in {there}: 1,234 bytes are needed, ")
    assert str(full).endswith(" are free")
    quota = str(not_written("x.json", there, 1, OSError(errno.EDQUOT, "no")))
    assert f"in {there} ({os.strerror(errno.EDQUOT)}): 1 bytes are needed" in quota
    with pytest.raises(
        DiskError, match=rf"^x\.json cannot be written to {there}: No such file or directory$"
    ):
        write_bytes(there / "x.json", b"x")
    write_json(there / "x.json", {"a": 1}, parents=True)
    if Path("/proc/self/fd").exists():
        with full_for("x.json", monkeypatch), pytest.raises(DiskError, match=r"no room for x\.json"):
            write_json(there / "x.json", {"a": 2})
    assert json.loads((there / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in there.iterdir()] == ["x.json"]
