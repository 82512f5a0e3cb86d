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
        processes: of the run; LOCAL_RANK, this one's number on its machine, tells those of one machine apart.

    Raises:
        ConfigError: there are more processes on this machine than devices, or nothing tells them apart.
    """
    if device.type != "cuda" or processes.here == 1:
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
        raise ConfigError(
            f"each process needs a CUDA device of its own; torch sees {devices} here for the {processes.here} "
            f"processes of this machine, of which this is number {place}. Give torchrun as many processes as devices, "
            "let every process see all devices of its machine, or use --device cpu"
        )
    torch.cuda.set_device(int(place))
    return torch.device("cuda", int(place))
