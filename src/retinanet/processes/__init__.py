"""The processes of a run: one by itself, or several that `torchrun` started and that train one network together.

What is decided (when to stop, what was found, how long to go on) is decided once and told to all, so that no process
waits for one that took another way. Messages between hosts go through gloo, tensors on CUDA devices through NCCL.
"""

from retinanet.processes.devices import device_of_process
from retinanet.processes.group import ALONE, Processes
from retinanet.processes.joining import joined_processes
from retinanet.processes.machine import available_cores

__all__ = ["ALONE", "Processes", "available_cores", "device_of_process", "joined_processes"]
