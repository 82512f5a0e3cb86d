"""Training the settings of a study: one process a run, several at a time, every result kept, none made twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console

from retinanet.devices import choose_device, resolve_precision
from retinanet.errors import CheckpointError, ConfigError, DivergedError, RetinaNetError, Stopped
from retinanet.folders import write_json
from retinanet.paper.own_loss import name_of_own_loss
from retinanet.paper.peers import seconds_of, train_peer
from retinanet.paper.settings import SCALES, ScaleName, Setting, change_of, options_of
from retinanet.processes import available_cores
from retinanet.training.configuration import TrainingOptions
from retinanet.training.folder import RunFolder
from retinanet.training.planning import plan_run
from retinanet.training.preparation import open_splits
from retinanet.training.run import Run, resume_training, run_training
from retinanet.training.state import newest_state

FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@dataclass(frozen=True)
class Job:
    """One run: a setting at a rate and a seed.

    `conditions` tells apart what else decides the result: the annotations, the scale's numbers, the weights.
    `seconds` is how long a peer trains: as long as ours did. `steps` stands in the place of the scale's, unless 0,
    `sgd` is the scale's.
    """

    setting: Setting
    scale: ScaleName
    data: str
    rate: float
    seed: int
    pretrained: str = "auto"
    conditions: str = ""
    seconds: float = 0.0
    steps: int = 0
    sgd: bool = False

    @property
    def change(self) -> Any:
        """What is changed of the recipe."""
        return change_of(self.setting, self.rate, sgd=self.sgd)

    @property
    def name(self) -> str:
        return f"{self.setting.key}/rate-{self.rate:g}-seed-{self.seed}"

    @property
    def folder(self) -> str:
        """The folder of all runs under the same conditions."""
        return "-".join(part for part in (self.scale, Path(self.data).name, self.conditions) if part)


@dataclass(frozen=True)
class Store:
    """Where results are: a JSON file a run under `results/`, which is worth keeping, and the run folders themselves."""

    folder: Path

    def file(self, job: Job) -> Path:
        return self.folder / "results" / job.folder / f"{job.name}.json"

    def run(self, job: Job) -> Path:
        return self.folder / "runs" / job.folder / job.name

    def model(self, job: Job) -> Path:
        """Return the run folder of a finished job, with its model.

        Raises:
            ConfigError: only its result is left, as in a copy of the results.
        """
        run = self.run(job)
        if not run.exists():
            raise ConfigError(
                f"the model {run} is gone and its result is left: remove {self.file(job)}, and its table trains it "
                "again"
            )
        return run

    def log(self, job: Job) -> Path:
        run = self.run(job)
        return run.with_name(f"{run.name}.log")

    def result(self, job: Job) -> dict[str, Any] | None:
        """Return what a finished run found."""
        file = self.file(job)
        return json.loads(file.read_text()) if file.exists() else None


@dataclass
class _Children:
    """The processes that are running: none is started any more once they are to stop."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopping: bool = False

    def run(self, arguments: Sequence[str], environment: dict[str, str], log: Path) -> int:
        """Run a process to its end and return its exit code, with what it prints in a file."""
        with log.open("wb") as output:
            with self.lock:
                if self.stopping:
                    return -signal.SIGTERM
                child = subprocess.Popen(arguments, env=environment, stdout=output, stderr=subprocess.STDOUT)
                self.running.add(child)
            code = child.wait()
            with self.lock:
                self.running.discard(child)
        return code

    def stop(self) -> None:
        with self.lock:
            self.stopping = True
            for child in self.running:
                child.terminate()


def run_all(
    jobs: Iterable[Job], store: Store, *, parallel: int, say: Callable[[str], None], done: Callable[[], None]
) -> list[str]:
    """Run the jobs that have no result yet, `parallel` at a time; return what failed.

    A signal stops them, and what they have not finished is done when the command is given again.

    Args:
        say: told a line for every run.
        done: called after every run, from one thread at a time.
    """
    waiting = [job for job in dict.fromkeys(jobs) if store.result(job) is None]
    failures: list[str] = []
    lock, children, used = threading.Lock(), _Children(), Counter[str]()
    devices = visible_devices()

    def run(number: int, job: Job) -> None:
        with lock:
            device = min(devices, key=lambda name: used[name]) if devices else None
            used[device or ""] += 1
        code, tail = _run_apart(job, store, parallel, device, children)
        result = store.result(job)
        with lock:
            used[device or ""] -= 1
            if result is not None:
                found = f"AP {result['ap']:.3f}" if "diverged" not in result else "diverged"
                took = f", {result['seconds'] / 60:.1f} min" if "seconds" in result else ""
                say(f"{number}/{len(waiting)} {job.name}: {found}{took}")
            elif not children.stopping:
                failures.append(f"{job.name}: exit code {code}; {tail}")
                say(f"{number}/{len(waiting)} {job.name}: failed ({tail})")
            done()

    with _interrupted_by_sigterm(), ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(run, number, job) for number, job in enumerate(waiting, 1)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            children.stop()
            raise
    return failures


def visible_devices() -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, so that no run is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_apart(
    job: Job, store: Store, parallel: int, device: str | None, children: _Children
) -> tuple[int, str]:
    """Run a job in a process of its own; return its exit code and the last line that it printed."""
    threads = str(max(1, len(available_cores()) // parallel))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    log = store.log(job)
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = [sys.executable, "-m", "retinanet.paper.running", json.dumps(asdict(job)), str(store.folder)]
    code = children.run(arguments, environment, log)
    lines = log.read_text(errors="replace").splitlines()
    return code, lines[-1] if lines else "nothing printed"


def run_one(job: Job, store: Store) -> None:
    """Train one setting in this process and write its result; a loss that is not finite is a result, too.

    A run that was interrupted goes on from its newest state. One that another process is at is waited for, not made
    twice: several commands, on several machines with one disk, may fill a folder together.
    """
    folder = store.run(job)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if store.result(job) is None:
            _run(job, store, folder)


def _run(job: Job, store: Store, folder: Path) -> None:
    goes_on = job.setting.peer is None and newest_state(RunFolder(folder).checkpoints)[0] is not None
    if not goes_on:
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    device = choose_device("auto")
    clock = seconds_of(device)
    began, own = time.monotonic(), clock()
    scale = SCALES[job.scale]
    if job.steps:
        scale = replace(scale, steps=job.steps)
    options = options_of(job.setting, scale, job.data, seed=job.seed, pretrained=job.pretrained)
    options = replace(options, output=str(folder), validate_every_steps=options.steps, log_to="none")
    result: dict[str, Any] = {"setting": asdict(job.setting), "rate": job.rate, "seed": job.seed}
    try:
        result |= (
            _train(job, options, goes_on=goes_on) if job.setting.peer is None else _train_peer(job, options)
        )
    except DivergedError as error:
        result |= {**dict.fromkeys(FIGURES, 0.0), "diverged": str(error)}
    if not goes_on:  # else what it took before is not known
        result |= {"seconds": round(time.monotonic() - began, 1), "own_seconds": round(clock() - own, 1)}
    result |= {
        "device": device.type,
        "precision": resolve_precision(device, options.precision),
        "torch": str(torch.__version__),
    }
    store.file(job).parent.mkdir(parents=True, exist_ok=True)
    write_json(store.file(job), result)
    for name in ("last", "checkpoints"):  # tables need neither
        shutil.rmtree(folder / name, ignore_errors=True)


def _train(job: Job, options: TrainingOptions, *, goes_on: bool) -> dict[str, Any]:
    if job.setting.own_loss is not None:
        file, name = job.setting.own_loss
        if name_of_own_loss(Path(file)) != name:
            raise ConfigError(
                f"--own-loss {file} was edited since the tables were begun: give the command again"
            )
    console = Console(width=200)
    if goes_on:
        assert options.output is not None
        try:
            return _figures(resume_training(Path(options.output), console, job.change))
        except (ConfigError, CheckpointError) as error:
            raise ConfigError(f"{error}. To begin this run anew, remove {options.output}") from None
    run = run_training(options, console, job.change)
    assert run is not None  # no dry run
    return _figures(run)


def _figures(run: Run) -> dict[str, Any]:
    return {name: run.metrics[name] for name in FIGURES}


def _train_peer(job: Job, options: TrainingOptions) -> dict[str, Any]:
    assert job.setting.peer is not None
    train, val = open_splits(options.data)
    plan = plan_run(options, train, job.change)
    done = train_peer(job.setting.peer, plan, train, val, job.seconds, Path(options.output or ""))
    found = done.metrics.to_json()
    return {**{name: found[name] for name in FIGURES}, "steps": done.steps}


def job_of(text: str) -> Job:
    """Read a job as `_run_apart` writes it."""
    values = json.loads(text)
    setting = values.pop("setting")
    setting["told"] = tuple((name, value) for name, value in setting["told"])
    if setting.get("own_loss") is not None:
        setting["own_loss"] = tuple(setting["own_loss"])
    return Job(setting=Setting(**setting), **values)


def main(arguments: Sequence[str]) -> int:
    job, folder = arguments
    try:
        run_one(job_of(job), Store(Path(folder)))
    except RetinaNetError as error:
        print(f"retinanet: {error}", flush=True)
        return 2
    except Stopped as stop:
        print(f"retinanet: {stop}", flush=True)
        return stop.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
