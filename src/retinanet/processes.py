"""The processes of a run: one by itself, or several that `torchrun` started and that train one network together.

What is decided (when to stop, what was found, how long to go on) is decided once and told to all, so that no process
waits for one that took another way. Messages between hosts go through gloo, tensors on CUDA devices through NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from retinanet.errors import ConfigError, LostProcessError, RetinaNetError

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class Processes:
    """This process among those of its run.

    Every method but the properties is to be called by all of them, in the same order; alone each is a matter of course.

    Args:
        rank: of this one, from 0.
        count: of all.
        messages: the group through which what lies in the host's memory goes; None is the group of all.
    """

    rank: int = 0
    count: int = 1
    messages: Any = field(default=None, compare=False, repr=False)

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.count > 1

    def told(self, value: T) -> T:
        """Return the main process's value."""
        if not self.several:
            return value
        box = [value]
        _exchange(dist.broadcast_object_list, box, src=0, group=self.messages)
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """Return every process's value, by rank."""
        if not self.several:
            return [value]
        found: list[T | None] = [None] * self.count
        _exchange(dist.all_gather_object, found, value, group=self.messages)
        return cast(list[T], found)

    def largest(self, *values: int) -> list[int]:
        """Return the largest of every process's values, place by place."""
        if not self.several:
            return list(values)
        together = torch.tensor(values)
        _exchange(dist.all_reduce, together, op=dist.ReduceOp.MAX, group=self.messages)
        return [int(value) for value in together]

    def add(self, tensor: Tensor) -> Tensor:
        """Add every process's tensor, in place; return it."""
        if self.several:
            _exchange(dist.all_reduce, tensor)
        return tensor

    def add_later(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to add every process's tensor, in place; return what waits for the end of it."""
        if not self.several:
            return lambda: None
        work = _exchange(dist.all_reduce, tensor, async_op=True)

        def wait() -> None:
            _exchange(work.wait)

        return wait

    def copy_of_main(self, tensor: Tensor) -> None:
        """Give a tensor the main process's values, in place."""
        if self.several:
            _exchange(dist.broadcast, tensor, src=0)

    def wait(self) -> None:
        """Return when every process is here."""
        self.largest(0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process do what is inside before the others: it compiles, downloads and caches for all, and
        complains for all.

        Raises:
            LostProcessError: in the others, where it failed in the main one.
        """
        if not self.several:
            yield
            return
        if not self.main and self.told("") != "":
            raise LostProcessError("the first process of the run could not begin; its message says why")
        try:
            yield
        except BaseException as error:
            if self.main:
                self.told(type(error).__name__)
            raise
        if self.main:
            self.told("")


ALONE = Processes()


def _exchange(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call into torch.distributed.

    Raises:
        LostProcessError: another process has ended.
    """
    try:
        return call(*args, **kwargs)
    except RetinaNetError:
        raise
    except RuntimeError as error:  # DistBackendError and its like are RuntimeErrors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LostProcessError(
            f"another process of the run has ended, or cannot be reached; its message says why ({reason[:200]}). "
            "Go on with --resume"
        ) from None


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that `torchrun` started with this one, for as long as the block runs; alone without it."""
    if dist.is_available() and dist.is_initialized():  # by whoever calls us from Python, Ray for one
        backends = dist.get_backend_config()
        messages: Any = None if "gloo" in backends else _exchange(dist.new_group, backend="gloo")
        yield Processes(dist.get_rank(), dist.get_world_size(), messages)
        return
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    if not dist.is_available():
        raise ConfigError(
            "several processes need a torch with torch.distributed; this one was built without it"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    _exchange(_meet, backend)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Find the other processes, at the place that `torchrun` names in the environment.

    Torch 2.15 leaves the addresses of processes that have ended in that place when torchrun starts others there; under
    a name of their own the new ones do not read them.
    """
    from torch.distributed.rendezvous import rendezvous  # which a torch without distributed does not have

    store, rank, count = next(rendezvous("env://"))
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"retinanet/{again}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=count)


def device_of_process(device: torch.device) -> torch.device:
    """Return the CUDA device of this process where several share a machine, from now on torch's own choice; any other
    device stays.

    Raises:
        ConfigError: there are more processes on this machine than devices.
    """
    place = os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or place is None or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return device
    if int(place) >= torch.cuda.device_count():
        raise ConfigError(
            f"each process needs a CUDA device of its own; torch sees {torch.cuda.device_count()} here for "
            f"{os.environ['LOCAL_WORLD_SIZE']} processes. Give torchrun as many processes, or use --device cpu"
        )
    torch.cuda.set_device(int(place))
    return torch.device("cuda", int(place))
