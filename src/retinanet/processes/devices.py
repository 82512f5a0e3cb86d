"""Which CUDA device is a process's own."""

from __future__ import annotations

import os

import torch

from retinanet.errors import ConfigError
from retinanet.processes.group import ALONE, Processes


def device_of_process(device: torch.device, processes: Processes = ALONE) -> torch.device:
    """Return the CUDA device of this process where several share a machine, from now on torch's own choice; any other
    device stays.

    Args:
        processes: of the run. LOCAL_RANK, this one's number on its machine, tells them apart; without
            LOCAL_WORLD_SIZE nobody knows how many there are, and one of several may not be alone.

    Raises:
        ConfigError: there are more processes on this machine than devices, or nothing tells them apart.
    """
    if device.type != "cuda":
        return device
    here = os.environ.get("LOCAL_WORLD_SIZE")
    alone = not processes.several if here is None else here == "1"
    if alone:
        return device
    place, devices = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if place is None:
        if devices == 1:  # whoever started this process may have given it one of its own
            return device
        raise ConfigError(
            f"each process needs a CUDA device of its own, the one of its LOCAL_RANK, which is not set; torch sees "
            f"{devices} here. Start with torchrun, or set LOCAL_RANK to 0, 1, ... for the processes of each machine"
        )
    if int(place) >= devices:
        for_what = f"{here} processes" if here else f"the process with LOCAL_RANK {place}"
        raise ConfigError(
            f"each process needs a CUDA device of its own; torch sees {devices} here for {for_what}. Give torchrun as "
            "many processes as devices, let every process see all devices of its machine, or use --device cpu"
        )
    torch.cuda.set_device(int(place))
    return torch.device("cuda", int(place))
