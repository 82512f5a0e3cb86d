"""What a run survives, done to real runs, with figures: kills, damage, full disks, signals.

    python tests/faults.py kills --times 200      SIGKILL at random moments, saving included, each time resumed
    python tests/faults.py kills-of-two           the same to one of two processes; the other has to end
    python tests/faults.py damage --times 2000    flipped bytes and cuts in every file of a state
    python tests/faults.py disk                   disks and files that are full, whatever is being written
    python tests/faults.py signals                SIGTERM and SIGINT in each phase, alone and with two processes
    python tests/faults.py few-signals            three of them

Each prints a line a case, and exits with 1 where something is lost that should not be. `test_faults.py`: short forms.
Processes are forked when everything is imported and nothing has run yet: a life takes a second or two, not ten.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from retinanet.cli.main import main as command
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import CheckpointError
from retinanet.training import judging, preparation, run, saving, story
from retinanet.training.folder import RunFolder
from retinanet.training.gradients import GradientSum
from retinanet.training.state import State, read_state, save_state
from retinanet.training.step import TrainingStep

TINY: dict[str, Any] = {
    "backbone": "test_resnet",
    "pretrained": "none",
    "channels": 64,
    "image_size": 64,
    "batch_size": 2,
    "device": "cpu",
    "workers": 0,
    "steps": 24,
    "validate_every_steps": 8,
    "save_every_steps": 1,
}
# Where a run is stopped: a phase, and the steps that are done where it matters. "part": with half of a step's images
# through the network.
Moment: TypeAlias = tuple[str, int | None]
MOMENTS: tuple[Moment, ...] = (
    ("planning", None),
    ("step", 0),
    ("step", 5),
    ("part", 5),
    ("saving", None),
    ("validation", None),
    ("report", None),
)
# Longest that a stop may take.
PATIENCE = 30.0
# Seconds in which a process that lost the other one may end by itself; then it is told to, as torchrun does at once.
PATIENCE_OF_ONE = 10.0


def generated(folder: Path) -> Path:
    return generate_shapes(folder / "shapes", train=6, val=2, spec=ShapesSpec(image_size=96))


@contextlib.contextmanager
def phases(entered: Callable[[str, int], None]) -> Iterator[None]:
    """Call `entered` with each phase that a run comes to, and how many of the run's steps are done."""
    done, made = [0], [0]
    plan, step, save, judge, report, restore, begin = (
        preparation.plan_run,
        TrainingStep.__call__,
        saving.save_state,
        judging.validate,
        run.draw_run,
        saving.Saving.restore,
        GradientSum.begin,
    )

    def restoring(self: saving.Saving, state: State, *args: Any) -> int:
        done[0] = made[0] = restore(self, state, *args)
        return done[0]

    def beginning(self: GradientSum, last: bool) -> None:
        begin(self, last)
        if last:
            entered("part", made[0] - 1)

    def planning(*args: Any, **kwargs: Any) -> Any:
        entered("planning", 0)
        return plan(*args, **kwargs)

    def stepping(self: TrainingStep, batch: Any, lr: float) -> Any:
        entered("step", made[0])
        made[0] += 1
        return step(self, batch, lr)

    def in_saving(folder: Path, state: State) -> Any:
        done[0] = state.step
        entered("saving", state.step)
        found = save(folder, state)
        entered("saved", state.step)
        return found

    def in_judging(*args: Any, **kwargs: Any) -> Any:
        entered("validation", done[0])
        return judge(*args, **kwargs)

    def reporting(*args: Any, **kwargs: Any) -> Any:
        entered("report", done[0])
        return report(*args, **kwargs)

    preparation.plan_run, TrainingStep.__call__, saving.save_state = planning, stepping, in_saving  # type: ignore[method-assign]
    judging.validate, run.draw_run = in_judging, reporting
    saving.Saving.restore, GradientSum.begin = restoring, beginning  # type: ignore[method-assign]
    try:
        yield
    finally:
        preparation.plan_run, TrainingStep.__call__, saving.save_state = plan, step, save  # type: ignore[method-assign]
        judging.validate, run.draw_run = judge, report
        saving.Saving.restore, GradientSum.begin = restore, begin  # type: ignore[method-assign]


def forked(body: Callable[[], None], said: Path, environment: dict[str, str] | None = None) -> int:
    """Run a command in a process of its own; return its number. What it says goes to a file."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment or {})
        stream = said.open("a")
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        torch.set_num_threads(1)
        try:
            body()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, seconds: float = 120.0) -> tuple[int, float]:
    """Wait for a process; return its exit code (minus the signal's number) and how long it took."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -999, seconds


def trained(data: Path, folder: Path, **more: Any) -> Callable[[], None]:
    """Return what begins a run, or goes on with it where it has begun."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, **more}.items()]

    def body() -> None:
        if (folder / "config.yaml").is_file():
            command(["train", "--resume", str(folder)])
        else:
            command(["train", str(data), "--output", str(folder), *options])

    return body


def newest(folder: Path) -> State | None:
    """Return the newest sound state, and leave everything as it lies."""
    for place in sorted((folder / "checkpoints").glob("[0-9]*"), reverse=True):
        with contextlib.suppress(CheckpointError):
            return read_state(place)
    return None


def same(ours: State | None, theirs: State | None) -> bool:
    assert theirs is not None
    return (
        ours is not None
        and (ours.step, ours.values) == (theirs.step, theirs.values)
        and all(
            torch.equal(tensor, theirs.parts[part][name])
            for part, tensors in ours.parts.items()
            for name, tensor in tensors.items()
        )
    )


@dataclass
class Kills:
    """What became of runs that were killed."""

    lives: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    wrong: list[str] = field(default_factory=list)
    most_lost: int = 0

    def __str__(self) -> str:
        where = ", ".join(f"{phase} {times}" for phase, times in sorted(self.killed.items()))
        return (
            f"{sum(self.killed.values())} kills ({where}); {self.finished} runs came to their end, equal to one that "
            f"was never stopped; at most {self.most_lost} steps lost of the 1 between two states; "
            f"{len(self.wrong)} failures"
        )


def kills(folder: Path, times: int, seed: int) -> Kills:
    """Kill runs at random moments until it was done `times` times, each time resumed.

    A state is saved at every step: of the last step that ended before a kill nothing may be lost but the step in hand.
    """
    random_ = random.Random(seed)
    data = generated(folder)
    whole = folder / "whole"
    began = time.monotonic()
    code, _ = ended(
        forked(trained(data, whole), folder / "said-whole"), 600.0
    )  # kernels may have to be compiled
    assert code == 0, (folder / "said-whole").read_text()
    usual = time.monotonic() - began
    expected, found = newest(whole), Kills()
    notes = folder / "phase"
    number = 0
    while sum(found.killed.values()) < times:
        number += 1
        target = folder / f"run-{number}"
        known = 0
        while True:
            notes.write_text("start 0")
            handle = os.open(notes, os.O_WRONLY)

            def noted(phase: str, step: int, handle: int = handle) -> None:
                os.pwrite(handle, f"{phase} {step}".ljust(40).encode(), 0)

            def life(target: Path = target, noted: Callable[[str, int], None] = noted) -> None:
                with phases(noted):
                    trained(data, target)()

            said = folder / f"said-{number}"
            child = forked(life, said)
            found.lives += 1
            deadline = time.monotonic() + random_.uniform(0.02, 0.5 * usual)
            code = None
            while time.monotonic() < deadline and code is None:
                pid, status = os.waitpid(child, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if pid else None
                time.sleep(0.001)
            if code is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            os.close(handle)
            phase, step = notes.read_text().split()
            if code is not None:
                if code != 0:
                    found.wrong.append(f"run {number} ended with {code}: {said.read_text()[-300:]}")
                elif same(newest(target), expected) and log_of(target) == log_of(whole):
                    found.finished += 1
                else:
                    found.wrong.append(f"run {number} ended with other weights or another log")
                break
            found.killed[phase] += 1
            if phase == "saved":
                known = max(known, int(step))
            state = newest(target)
            reached = 0 if state is None else state.step
            # The report's state and what comes before a step or a validation are saved.
            told = ("saved", "step", "part", "validation", "report")
            at_least = max(known, int(step)) if phase in told else known
            found.most_lost = max(found.most_lost, at_least - reached)
            if reached < at_least:
                found.wrong.append(f"run {number}: killed in {phase} of step {step}, state of step {reached}")
            known = max(known, reached)
            if sum(found.killed.values()) >= times + 20 and found.finished:
                break
        shutil.rmtree(target, ignore_errors=True)
    return found


def kills_of_two(folder: Path, times: int, seed: int) -> tuple[str, list[str]]:
    """Kill one of two processes at random moments, go on with both; return what was seen, and what was wrong.

    The other one has to end by itself, or when it is told to, as `torchrun` does.
    """
    random_ = random.Random(seed)
    data = generated(folder)
    whole = folder / "whole"
    began = time.monotonic()
    ends = [ended(child, 600.0)[0] for child in _two(trained(data, whole), folder)]
    assert ends == [0, 0], (folder / "said-0").read_text()
    usual, expected = time.monotonic() - began, newest(whole)
    killed, finished, alone, longest, wrong = 0, 0, 0, 0.0, list[str]()
    while (killed < times or not finished) and not wrong:
        target = folder / f"run-{killed}"
        while True:
            children = _two(trained(data, target), folder)
            if killed < times:
                time.sleep(random_.uniform(0.02, 0.6 * usual))
                victim = random_.randrange(2)
                other = children[1 - victim]
                os.kill(children[victim], signal.SIGKILL)
                if ended(children[victim])[0] == -signal.SIGKILL:
                    killed += 1
                    code, seconds = _left(other)
                    alone, longest = alone + (seconds < PATIENCE_OF_ONE), max(longest, seconds)
                    if seconds > PATIENCE:
                        wrong.append(f"the process that was left ended with {code} after {seconds:.1f} s")
                    if code:
                        continue
                    ends = [0, 0]  # it needed the other no more
                else:
                    ends = [0, ended(other)[0]]  # it had ended well before
            else:
                ends = [ended(child)[0] for child in children]
            if ends != [0, 0]:
                wrong.append(f"ended with {ends}: {(folder / 'said-0').read_text()[-300:]}")
            elif same(newest(target), expected) and log_of(target) == log_of(whole):
                finished += 1
            else:
                wrong.append("ended with other weights or another log")
            break
        shutil.rmtree(target, ignore_errors=True)
    told = (
        f"{killed} kills of one of two processes, the other one ended after {longest:.1f} s at most, {alone} times by "
        f"itself; {finished} runs came to their end, equal to one that was never stopped; {len(wrong)} failures"
    )
    return told, wrong


def _two(body: Callable[[], None], folder: Path) -> list[int]:
    """Begin a run of two processes; return their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for each in range(2):
        (folder / f"said-{each}").write_text("")
    return [forked(body, folder / f"said-{each}", {**told, "RANK": str(each)}) for each in range(2)]


def _left(child: int) -> tuple[int, float]:
    """Wait for a process that lost the other one; if it does not end, tell it to."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE_OF_ONE:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    code, _ = ended(child, 2 * PATIENCE)
    return code, time.monotonic() - began


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return what a run's log says, but for times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k in ("step", "loss", "lr", "ap", "ap50")} for line in lines]


def damage(folder: Path, times: int, seed: int) -> tuple[int, list[str]]:
    """Flip bytes and cut files of a state; return how often, and which damage was not noticed."""
    random_ = random.Random(seed)
    torch.manual_seed(0)
    parts = {
        "network": {"weight": torch.randn(50, 7)},
        "optimizer": {"0/0/step": torch.tensor(3.0)},
        "meter": {},
    }
    place = save_state(folder / "states", State(7, parts, {"skipped_in_a_row": 0, "unreadable": ["a"]}))
    files = sorted(place.iterdir())
    missed = []
    for number in range(times):
        file = files[number % len(files)]
        content = file.read_bytes()
        at = random_.randrange(len(content))
        if number // len(files) % 4 == 3:
            wrong, what = content[:at], f"{file.name} cut at {at}"
        else:
            bit = 1 << random_.randrange(8)
            wrong = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
            what = f"{file.name}: bit {bit} of byte {at}"
        file.write_bytes(wrong)
        try:
            read_state(place)
            missed.append(what)
        except CheckpointError as error:
            if str(place) not in str(error):
                missed.append(f"{what}: {error}")
        file.write_bytes(content)
    read_state(place)
    return times, missed


# What a full disk may find being written: what is called, and what the message names.
Written: TypeAlias = Literal["state", "log", "model", "page"]
WRITERS: dict[Written, tuple[Any, str, str]] = {
    "state": (saving, "save_state", "the training state"),
    "log": (RunFolder, "log", "metrics.jsonl"),
    "model": (judging, "save_model", "model.safetensors"),
    "page": (story, "write_report", "report.html"),
}
# Where that is written for the first time in a run of twelve steps, and a state is there.
TWELVE: dict[str, Any] = {"steps": 12, "validate_every_steps": 4, "log_to": "none"}
SMALL: tuple[Written, ...] = ("state", "model")
NO_ROOM = r"no room for {what} in .+: [\d,]+ bytes are needed, [\d,]+ are free\. .*--resume"


def disk(folder: Path) -> list[tuple[str, bool, str]]:
    """Fill the disk in the middle of a run: a small file system where we may mount one, and a limit on files."""
    data = generated(folder)
    whole, found = folder / "whole", list[tuple[str, bool, str]]()
    assert ended(forked(trained(data, whole, **TWELVE), folder / "said-whole"), 600.0)[0] == 0
    small = folder / "small"
    small.mkdir()
    if os.geteuid() == 0 and os.system(f"mount -t tmpfs -o size=56m tmpfs {small} 2>/dev/null") == 0:
        try:
            found += [
                _filled("a disk of 56 MiB", what, data, small / "run", whole, small / "other")
                for what in SMALL
            ]
        finally:
            os.system(f"umount -l {small}")
    return found + [
        _filled("files of no byte", what, data, folder / "limited", whole, None) for what in WRITERS
    ]


def _filled(
    name: str, what: Written, data: Path, target: Path, whole: Path, fill: Path | None
) -> tuple[str, bool, str]:
    """Let there be no more room when something is written: on the disk from then on, or for files just then."""
    said = data.parent / "said-full"
    said.write_text("")
    owner, function, named = WRITERS[what]
    write, written = getattr(owner, function), [0]

    def writing(*args: Any, **kwargs: Any) -> Any:
        written[0] += 1
        if written[0] != 2:
            return write(*args, **kwargs)
        if fill is not None:
            with contextlib.suppress(OSError), fill.open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(4096))
            return write(*args, **kwargs)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            return write(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def body() -> None:
        setattr(owner, function, writing)
        trained(data, target, **TWELVE)()

    code, _ = ended(forked(body, said))
    lines = said.read_text().strip().splitlines()
    state = newest(target)
    if what == "page":  # which a run can do without
        message = next((line for line in lines if named in line), lines[-1])
        right = code == 0 and f"no room for {named}" in message
    else:
        message = lines[-1]
        right = code == 2 and re.search(NO_ROOM.format(what=named), message) is not None and state is not None
    if fill is not None:
        fill.unlink(missing_ok=True)
    again, _ = ended(forked(trained(data, target), said))
    right = right and again == 0 and same(newest(target), newest(whole)) and log_of(target) == log_of(whole)
    shutil.rmtree(target, ignore_errors=True)
    return f"{name}, {what}", right, f"exit {code}: {message}"


def signals(folder: Path) -> list[tuple[str, bool, str]]:
    """Stop runs by a signal in each phase, alone and with two processes; return what was done, whether it was right."""
    cases = [
        (count, moment, rank, number)
        for count in (1, 2)
        for moment in MOMENTS
        for rank in range(count)
        for number in (signal.SIGTERM, signal.SIGINT)
    ]
    return _signalled(folder, cases)


def few_signals(folder: Path) -> list[tuple[str, bool, str]]:
    """Before the first step, between two parts of one, and in a validation, each to one of two processes alone."""
    cases = [
        (2, ("step", 0), 1, signal.SIGINT),
        (2, ("part", 2), 0, signal.SIGTERM),
        (2, ("validation", None), 1, signal.SIGTERM),
    ]
    return _signalled(folder, cases, steps=6, validate_every_steps=4)


def _signalled(
    folder: Path, cases: Sequence[tuple[int, Moment, int, int]], **more: Any
) -> list[tuple[str, bool, str]]:
    """Stop a run for each case (processes, moment, which of them, signal), and go on with it."""
    data = generated(folder)
    more = {"batch_size": 4, "accumulate": 2, **more}
    found = []
    for count in sorted({count for count, _, _, _ in cases}):
        whole = folder / f"whole-{count}"
        codes = [code for code, _ in _together(trained(data, whole, **more), count, folder, None, -1, 0)]
        assert codes == [0] * count, (folder / "said-0").read_text()
        for _, moment, rank, number in (case for case in cases if case[0] == count):
            target = folder / "stopped"
            ends = _together(trained(data, target, **more), count, folder, moment, rank, number)
            phase, step = moment
            where = phase if step is None else f"{phase}, {step} steps done"
            name = f"{signal.Signals(number).name} in {where}, process {rank + 1} of {count}"
            codes, seconds = [code for code, _ in ends], max(seconds for _, seconds in ends)
            again = _together(trained(data, target), count, folder, None, -1, 0)
            # The other is told by torchrun, unless it finds first that it is alone: a validation is given up at once,
            # and told while it leaves, when the run listens no more, it ends by the signal itself.
            alone = (2, -signal.SIGTERM) if phase == "validation" else ()
            others = (128 + number, 128 + signal.SIGTERM, *alone)
            right = (
                codes[rank] == 128 + number
                and all(code in others for code in codes)
                and seconds < PATIENCE
                and all(end[0] == 0 for end in again)
                and same(newest(target), newest(whole))
                and log_of(target) == log_of(whole)
            )
            found.append(
                (name, right, f"exit {codes} after {seconds:.1f} s, then resumed to the same weights")
            )
            shutil.rmtree(target, ignore_errors=True)
    return found


def _together(
    body: Callable[[], None], count: int, folder: Path, moment: Moment | None, rank: int, number: int
) -> list[tuple[int, float]]:
    """Run one or two processes, one of which gets a signal when it comes to a moment; return how each ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    # What the first process alone does (saving, the report), the parent sees in a file, and tells the second.
    there = folder / "there"
    there.unlink(missing_ok=True)
    for each in range(count):
        sent = [False]

        def entered(now: str, step: int, each: int = each, sent: list[bool] = sent) -> None:
            if sent[0] or moment not in ((now, None), (now, step)):
                return
            sent[0] = True
            if each == rank:
                os.kill(os.getpid(), number)
            elif each == 0 and now in ("saving", "report"):
                there.touch()
                time.sleep(0.5)

        def life(entered: Callable[[str, int], None] = entered) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with phases(entered):
                body()

        told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(each)}
        said = folder / f"said-{each}"
        said.write_text("")
        children.append(forked(life, said, told if count > 1 else {}))
    ends: dict[int, tuple[int, float]] = {}
    began = time.monotonic()
    while len(ends) < count:
        if there.exists():
            there.unlink()
            os.kill(children[rank], number)
        for each, child in enumerate(children):
            if each not in ends:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    ends[each] = (os.waitstatus_to_exitcode(status), time.monotonic() - began)
                    if count > 1 and ends[each][0]:  # as torchrun does
                        for other in set(range(count)) - set(ends):
                            os.kill(children[other], signal.SIGTERM)
        time.sleep(0.005)
        if time.monotonic() - began > 120:
            for each in set(range(count)) - set(ends):
                os.kill(children[each], signal.SIGKILL)
    return [ends[each] for each in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = ("kills", "kills-of-two", "damage", "disk", "signals", "few-signals")
    parser.add_argument("what", choices=choices)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.what == "kills":
            of_kills = kills(folder, given.times, given.seed)
            print(of_kills)
            print(*of_kills.wrong, sep="\n")
            return int(bool(of_kills.wrong) or not of_kills.finished)
        if given.what == "kills-of-two":
            told, wrong = kills_of_two(folder, given.times, given.seed)
            print(told, *wrong, sep="\n")
            return int(bool(wrong))
        if given.what == "damage":
            times, missed = damage(folder, given.times, given.seed)
            print(f"{times} flips and cuts, {times - len(missed)} noticed")
            print(*missed, sep="\n")
            return int(bool(missed))
        rows = {"disk": disk, "signals": signals, "few-signals": few_signals}[given.what](folder)
        for what, right, said in rows:
            print(f"{'right' if right else 'WRONG'}: {what}: {said}", flush=True)
        return int(not all(right for _, right, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
