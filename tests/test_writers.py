"""Where figures go beside metrics.jsonl: TensorBoard, W&B, MLflow; and that a run never ends by them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import ConfigError, MissingExtraError, Stopped
from retinanet.training.configuration import TrainingOptions
from retinanet.training.folder import RunFolder
from retinanet.training.run import resume_training, run_training
from retinanet.training.writers import Writers, chosen_writers, figures_of
from test_resume import TINY, stop_at, terminate

pytestmark = pytest.mark.usefixtures("undrawn")

TRAINED = {"step": 10, "epoch": 0.5, "loss": 1.5, "lr": 0.1, "seconds_step": 2.0}
JUDGED = {
    "step": 10,
    "epoch": 0.5,
    "ap": 0.25,
    "ap_small": None,
    "per_class": {"a/b": {"ap": 0.5, "ap50": 0.75}, "c": {"ap": None, "ap50": None}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return generate_shapes(folder, train=6, val=2, spec=ShapesSpec(image_size=96))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the writers set there ends with each test."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


def asked(log_to: str, **options: Any) -> TrainingOptions:
    return TrainingOptions(data="DATA", log_to=log_to, **options)


# ------------------------------------------------------------------------------------- which


@pytest.mark.parametrize(
    ("log_to", "writers"),
    [
        ("auto", None),
        ("none", ()),
        ("wandb", ("wandb",)),
        ("mlflow, tensorboard,mlflow", ("tensorboard", "mlflow")),
    ],
)
def test_writers_are_named_with_commas(log_to: str, writers: object) -> None:
    assert asked(log_to).writers() == writers


@pytest.mark.parametrize("log_to", ["", "all", "none,wandb", "tensorboard,", "auto,mlflow"])
def test_other_names_are_refused(log_to: str) -> None:
    with pytest.raises(ConfigError, match="--log-to needs auto, none, or some of tensorboard, wandb, mlflow"):
        asked(log_to)


def test_a_near_name_is_guessed() -> None:
    with pytest.raises(ConfigError, match=r"got 'tensorbord'. Did you mean 'tensorboard'\?"):
        asked("tensorbord")


def test_one_that_is_asked_for_and_absent_is_an_error_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingExtraError, match=rf"{name} is not installed; .*retinanet\[{name}\]"):
            chosen_writers(asked(name))
    assert chosen_writers(asked("auto")) == ()
    options = TrainingOptions(data=str(tmp_path / "none"), output=str(tmp_path / "run"), log_to="mlflow")
    with pytest.raises(MissingExtraError):
        run_training(options, Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


def test_auto_is_tensorboard_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    assert chosen_writers(asked("auto")) == ("tensorboard",)


def test_figures_have_names_of_training_and_validation() -> None:
    assert figures_of(TRAINED) == {
        "train/epoch": 0.5,
        "train/loss": 1.5,
        "train/lr": 0.1,
        "train/seconds_step": 2.0,
    }
    assert figures_of(JUDGED) == {
        "val/epoch": 0.5,
        "val/ap": 0.25,
        "val/ap of class/a/b": 0.5,
        "val/ap50 of class/a/b": 0.75,
    }
    assert figures_of({"step": 10, "epoch": 0.5, "skipped": {"reason": "nan", "files": []}}) == {}


# ------------------------------------------------------------------------------------- each of them


class FakeWandb(ModuleType):
    """Remembers what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.over: list[tuple[str, str]] = []
        self.finished: list[int] = []

    def init(self, **how: Any) -> Any:
        self.inits.append(how)
        return SimpleNamespace(
            id=how["id"] or "fresh",
            log=self.logged.append,
            define_metric=lambda name, step_metric: self.over.append((name, step_metric)),
            finish=self.finish,
        )

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


class FakeMlflow(ModuleType):
    """Remembers what it is told."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.starts: list[dict[str, Any]] = []
        self.params: list[dict[str, Any]] = []
        self.metrics: list[tuple[dict[str, float], int, str]] = []
        self.ended: list[str] = []

    def active_run(self) -> None:
        return None

    def start_run(self, **how: Any) -> Any:
        self.starts.append(how)
        return SimpleNamespace(info=SimpleNamespace(run_id=how["run_id"] or "new"))

    def log_params(self, params: dict[str, Any]) -> None:
        self.params.append(params)

    def log_metrics(self, metrics: dict[str, float], step: int, run_id: str) -> None:
        self.metrics.append((metrics, step, run_id))

    def end_run(self, status: str) -> None:
        self.ended.append(status)


def told_to(
    name: str,
    folder: RunFolder,
    say: Callable[[str], None] = lambda _: None,
    first: int = 0,
    exit_code: int = 0,
) -> None:
    writers = Writers(say)
    writers.open(asked(name, lr=0.5), folder, first)
    writers.tell(TRAINED)
    writers.tell(JUDGED)
    writers.close(exit_code)


def test_wandb_gets_the_figures_and_a_resumed_run_is_the_same_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "blood")
    for first, exit_code in ((0, 143), (10, 0)):
        told_to("wandb", RunFolder(tmp_path), first=first, exit_code=exit_code)
    new, again = fake.inits
    assert (new["id"], new["project"], new["name"], new["dir"]) == (
        None,
        "blood",
        tmp_path.name,
        str(tmp_path),
    )
    assert new["config"]["lr"] == 0.5
    assert (again["id"], again["resume"]) == ("fresh", "allow")
    assert fake.over == [("*", "step")] * 2
    assert fake.logged[0] == {**figures_of(TRAINED), "step": 10}
    assert len(fake.logged) == 4
    assert fake.finished == [143, 0]


def test_mlflow_gets_the_figures_and_a_resumed_run_is_the_same_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for first, exit_code in ((0, 2), (10, 130), (10, 0)):
        told_to("mlflow", RunFolder(tmp_path), first=first, exit_code=exit_code)
    assert [start["run_id"] for start in fake.starts] == [None, "new", "new"]
    assert [start["run_name"] for start in fake.starts] == [tmp_path.name, None, None]
    assert len(fake.params) == 1  # they cannot be changed there
    assert fake.metrics[0] == (figures_of(TRAINED), 10, "new")
    assert fake.ended == ["FAILED", "KILLED", "FINISHED"]


def test_names_that_mlflow_refuses_are_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    writers = Writers(print)
    writers.open(asked("mlflow"), RunFolder(tmp_path), 0)
    writers.tell({"step": 1, "ap": 0.5, "per_class": {"red cell (RBC)": {"ap": 0.5, "ap50": None}}})
    assert "val/ap of class/red cell _RBC_" in fake.metrics[0][0]


def test_tensorboard_holds_one_story_of_a_resumed_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writers = Writers(pytest.fail)
    writers.open(asked("tensorboard"), RunFolder(tmp_path), 0)
    for step in (10, 20, 30):  # killed after 30, with a state of step 10
        writers.tell({"step": step, "loss": float(step)})
    again = Writers(pytest.fail)
    again.open(asked("tensorboard"), RunFolder(tmp_path), 10)
    for step in (20, 30, 40):
        again.tell({"step": step, "loss": -float(step)})
    again.tell(JUDGED)
    again.close(0)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    told = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert told == [(10, 10.0), (20, -20.0), (30, -30.0), (40, -40.0)]
    assert found.Scalars("val/ap of class/a/b")[0].value == 0.5


# ------------------------------------------------------------------------------------- what fails


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_writer_that_fails_is_left_out_with_one_warning(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server is away\nand more")

    fake, other = FakeWandb(), FakeMlflow()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "mlflow", other)
    if when == "log":
        monkeypatch.setattr(fake, "logged", SimpleNamespace(append=away))
    else:
        monkeypatch.setattr(fake, when, away)
    said: list[str] = []
    told_to("wandb,mlflow", RunFolder(tmp_path), said.append)
    assert said == ["wandb gets nothing from here on, the run goes on without it: the server is away"]
    assert len(other.metrics) == 2


def test_a_run_tells_its_writers_what_its_log_holds(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on where one of them fails in the middle."""
    fake, failing = FakeWandb(), FakeMlflow()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "mlflow", failing)

    def log_metrics(metrics: dict[str, float], step: int, run_id: str) -> None:
        if step > 4:
            raise TimeoutError

    monkeypatch.setattr(failing, "log_metrics", log_metrics)
    run = tmp_path / "run"
    console = Console(record=True, width=200, file=io.StringIO())
    with monkeypatch.context() as patch:
        stop_at(6, patch, terminate)
        options = TrainingOptions(data=str(data), output=str(run), log_to="wandb,mlflow", **TINY)
        with pytest.raises(Stopped):
            run_training(options, console)
    resume_training(run, console)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    memory = ("train/memory_gb", "train/workers_gb")  # which the log of a run has not
    told = [{name: value for name, value in one.items() if name not in memory} for one in fake.logged]
    assert told == [{**figures_of(line), "step": line["step"]} for line in log]
    assert ("train/memory_gb" in fake.logged[0]) == Path("/proc").exists()
    assert fake.finished == [143, 0]
    assert [how["id"] for how in fake.inits] == [None, "fresh"]
    said = console.export_text()
    assert ", and to wandb, mlflow" in said
    assert said.count("mlflow gets nothing from here on, the run goes on without it: TimeoutError") == 1
