"""Training the settings of a study: one process a run, several at a time, every result kept, none made twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from retinanet.errors import RetinaNetError, TrainingError
from retinanet.folders import write_json
from retinanet.paper.settings import SCALES, ScaleName, Setting, change_of, options_of

FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@dataclass(frozen=True)
class Job:
    """One run: a setting at a rate and a seed."""

    setting: Setting
    scale: ScaleName
    data: str
    rate: float
    seed: int
    pretrained: str = "auto"

    @property
    def name(self) -> str:
        return f"{self.setting.key}/rate-{self.rate:g}-seed-{self.seed}"


@dataclass(frozen=True)
class Store:
    """Where results are: a JSON file a run under `results/`, which is worth keeping, and the run folders themselves.

    Results of another data set or scale never mix: each has a folder of its own.
    """

    folder: Path

    def file(self, job: Job) -> Path:
        return self.folder / "results" / f"{job.scale}-{Path(job.data).name}" / f"{job.name}.json"

    def run(self, job: Job) -> Path:
        return self.folder / "runs" / f"{job.scale}-{Path(job.data).name}" / job.name

    def result(self, job: Job) -> dict[str, Any] | None:
        """Return what a finished run found."""
        file = self.file(job)
        return json.loads(file.read_text()) if file.exists() else None


def run_all(
    jobs: Iterable[Job], store: Store, *, parallel: int, say: Callable[[str], None], done: Callable[[], None]
) -> list[str]:
    """Run the jobs that have no result yet, `parallel` at a time; return what failed.

    Args:
        say: told a line for every run.
        done: called after every run, from one thread at a time.
    """
    waiting = [job for job in dict.fromkeys(jobs) if store.result(job) is None]
    failures: list[str] = []
    lock, children = threading.Lock(), set[subprocess.Popen[bytes]]()
    devices: list[int] = list(range(torch.cuda.device_count()))

    def run(number: int, job: Job) -> None:
        with lock:
            device = devices.pop() if devices else None
        try:
            code, tail = _run_apart(job, store, parallel, device, children)
        finally:
            if device is not None:
                with lock:
                    devices.append(device)
        result = store.result(job)
        with lock:
            if result is None:
                failures.append(f"{job.name}: exit code {code}; {tail}")
                say(f"{number}/{len(waiting)} {job.name}: failed ({tail})")
            else:
                found = f"AP {result['ap']:.3f}" if "diverged" not in result else "diverged"
                say(f"{number}/{len(waiting)} {job.name}: {found}, {result['seconds'] / 60:.1f} min")
            done()

    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(run, number, job) for number, job in enumerate(waiting, 1)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            for child in tuple(children):
                child.terminate()
            raise
    return failures


def _run_apart(
    job: Job, store: Store, parallel: int, device: int | None, children: set[subprocess.Popen[bytes]]
) -> tuple[int, str]:
    """Run a job in a process of its own; return its exit code and the last line that it printed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // parallel))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
    log = store.run(job).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = [sys.executable, "-m", "retinanet.paper.running", json.dumps(asdict(job)), str(store.folder)]
    with log.open("wb") as output:
        child = subprocess.Popen(arguments, env=environment, stdout=output, stderr=subprocess.STDOUT)
        children.add(child)
        code = child.wait()
        children.discard(child)
    lines = log.read_text(errors="replace").splitlines()
    return code, lines[-1] if lines else "nothing printed"


def run_one(job: Job, store: Store) -> None:
    """Train one setting in this process and write its result; a loss that is not finite is a result, too."""
    import shutil
    import time

    from rich.console import Console

    from retinanet.training.run import run_training

    folder = store.run(job)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    began = time.monotonic()
    options = options_of(job.setting, SCALES[job.scale], job.data, seed=job.seed, pretrained=job.pretrained)
    options = replace(options, output=str(folder), validate_every_steps=options.steps)
    result: dict[str, Any] = {"setting": asdict(job.setting), "rate": job.rate, "seed": job.seed}
    try:
        run = run_training(options, Console(width=200), change_of(job.setting, job.rate))
        assert run is not None  # no dry run
        result |= {name: run.metrics[name] for name in FIGURES}
    except TrainingError as error:
        result |= {"ap": 0.0, "diverged": str(error)}
    result |= {"seconds": round(time.monotonic() - began, 1), "torch": str(torch.__version__)}
    shutil.rmtree(folder / "last", ignore_errors=True)
    store.file(job).parent.mkdir(parents=True, exist_ok=True)
    write_json(store.file(job), result)


def job_of(text: str) -> Job:
    """Read a job as `_run_apart` writes it."""
    values = json.loads(text)
    setting = values.pop("setting")
    setting["told"] = tuple((name, value) for name, value in setting["told"])
    return Job(setting=Setting(**setting), **values)


def main(arguments: Sequence[str]) -> int:
    job, folder = arguments
    try:
        run_one(job_of(job), Store(Path(folder)))
    except RetinaNetError as error:
        print(f"retinanet: {error}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
