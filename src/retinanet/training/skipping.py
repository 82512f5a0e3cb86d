"""What is skipped in training: steps of which a number was not finite, and images that cannot be read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from retinanet.data import Dataset
from retinanet.errors import DivergedError
from retinanet.folders import write_json
from retinanet.processes import Processes
from retinanet.training.folder import RunFolder
from retinanet.training.plan import Plan

# So many skipped steps in a row end a run: no single image does that.
IN_A_ROW = 10
# Replay files a run writes, of the first steps that it skips; the log names the images of all.
REPLAYS = 20


@dataclass(frozen=True)
class Skipped:
    """A step that changed nothing: the images of all processes."""

    step: int
    images: tuple[int, ...]
    loss: float

    @property
    def reason(self) -> str:
        if torch.isfinite(torch.tensor(self.loss)):
            return "a gradient was not finite"
        return f"the loss was {self.loss}"


class SkippedSteps:
    """Collects what steps say of their numbers, without waiting for the device, until it is asked.

    Args:
        processes: the images of a skipped step are those of all of them.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.in_a_row = 0
        # The longest streak of all readings, and its last step: on CUDA one may be over before it is read.
        self.longest, self.until = 0, 0
        self._unread: list[tuple[int, tuple[int, ...], Tensor, Tensor]] = []

    def note(self, step: int, images: tuple[int, ...], finite: Tensor, loss: Tensor) -> None:
        """Take what a step said; its tensors stay on the device."""
        self._unread.append((step, images, finite, loss.detach()))

    def read(self) -> list[Skipped]:
        """Return the steps skipped since the last reading."""
        if not self._unread:
            return []
        values = torch.stack(
            [torch.stack((f.float(), loss.float())) for _, _, f, loss in self._unread]
        ).tolist()
        found = []
        for (step, images, _, _), (finite, loss) in zip(self._unread, values, strict=True):
            self.in_a_row = 0 if finite else self.in_a_row + 1
            if self.in_a_row > self.longest:
                self.longest, self.until = self.in_a_row, step
            if not finite:  # in every process, as the sum over all of them was not
                everywhere = tuple(itertools.chain(*self.processes.gathered(images)))
                found.append(Skipped(step, everywhere, loss))
        self._unread = []
        return found

    def require_few(self, lr: float) -> None:
        """Raise where too many were skipped in a row, by now or before.

        Raises:
            DivergedError: with what to try.
        """
        if self.longest >= IN_A_ROW:
            raise DivergedError(
                f"the {self.longest} steps until step {self.until} were skipped: a loss or gradient of theirs was not "
                f"finite. One image does not do that, the weights do: start anew with a lower --lr, now {lr:g}, or "
                "with --precision fp32"
            )


class UnreadableImages:
    """Collects what was wrong with training images until it is told, once of each.

    Args:
        processes: each finds its own, and all know what was told.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.told: set[str] = set()
        self.untold: set[str] = set()

    def note(self, failures: Iterable[str]) -> None:
        """Take what was wrong with images of a step."""
        self.untold.update(set(failures) - self.told)

    def share(self) -> None:
        """Let all processes know what any of them found."""
        self.untold = set[str]().union(*self.processes.gathered(self.untold)) - self.told

    def take(self) -> list[str]:
        """Return what is to be told, of all processes; it is told then."""
        self.share()
        new, self.untold = sorted(self.untold), set()
        self.told.update(new)
        return new


def tell_skipped(folder: RunFolder, skipped: Skipped, plan: Plan, train: Dataset) -> str:
    """Write what was skipped into the log and, for the first such steps, what it takes to make its batch again
    (`training.replay`); return the line for people."""
    step = skipped.step
    epoch = step * plan.batch_size / plan.train_images
    files = [str(train.files[index]) for index in skipped.images]
    folder.log({"step": step, "epoch": epoch, "skipped": {"reason": skipped.reason, "files": files}})
    line = f"step {step} was skipped, as {skipped.reason}; weights stay as they were. Its images: {', '.join(files)}"
    place = folder.skipped / f"{step:08d}.json"
    if not place.exists() and len(list(folder.skipped.glob("*.json"))) < REPLAYS:
        images = [{"index": i, "file": file} for i, file in zip(skipped.images, files, strict=True)]
        values = {"step": step, "epoch": epoch, "reason": skipped.reason, "images": images}
        write_json(place, values, parents=True)
        line += f"; the batch again: retinanet.training.replay.replay({str(place)!r})"
    return line
