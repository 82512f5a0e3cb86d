"""Gradients of several processes, summed while the way back still goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from retinanet.processes import Processes

# Bytes that travel together: enough to use the line, few enough that most of them travel during the way back.
BUCKET = 25 * 2**20


class _Bucket:
    """Parameters whose gradients travel together, in one tensor."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.flat = torch.zeros(
            sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        # In the layout of the parameters, so that copies there and back go along memory.
        self.views, start = [], 0
        for parameter in parameters:
            part = self.flat[start : start + parameter.numel()]
            self.views.append(part.as_strided(parameter.shape, parameter.stride()))
            start += parameter.numel()
        self.arrived = 0
        self.wait: Callable[[], None] | None = None


class GradientSum:
    """Adds up the gradients of all processes, bucket by bucket in an order that never changes.

    Buckets are filled from the last parameter to the first, about as the way back reaches them, and each is sent as
    soon as it and those before it are full. That the order and the content of buckets are fixed makes a resumed run
    add in the same order as one that never stopped.

    Args:
        parameters: those that train, in the network's order; dense, on one device.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], processes: Processes, *, bucket: int = BUCKET
    ) -> None:
        self.processes = processes
        self.last = False
        self.buckets: list[_Bucket] = []
        self.place: dict[nn.Parameter, _Bucket] = {}
        self.sent = 0
        if not processes.several:
            return
        for members in _packed(reversed(list(parameters)), bucket):
            self.buckets.append(_Bucket(members))
            for parameter in members:
                self.place[parameter] = self.buckets[-1]
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def begin(self, last: bool) -> None:
        """Say before each way back whether it is the step's last, after which gradients are whole and can be sent."""
        self.last = last

    def forget(self) -> None:
        """Begin a step anew. What was sent stays: it was whole, and others have it in their sums."""
        for bucket in self.buckets:
            bucket.arrived = 0

    def _arrived(self, parameter: Tensor) -> None:
        if not self.last:
            return
        self.place[parameter].arrived += 1  # type: ignore[index]  # the hook is on parameters alone
        while self.sent < len(self.buckets) and self._full(self.buckets[self.sent]):
            self._send()

    @staticmethod
    def _full(bucket: _Bucket) -> bool:
        return bucket.arrived == len(bucket.parameters)

    def _send(self) -> None:
        bucket = self.buckets[self.sent]
        pairs = [
            (view, p.grad)
            for view, p in zip(bucket.views, bucket.parameters, strict=True)
            if p.grad is not None
        ]
        if len(pairs) < len(bucket.parameters):  # what no loss depends on has no gradient, in any process
            bucket.flat.zero_()
        _copy(pairs)
        bucket.wait = self.processes.add_later(bucket.flat)
        self.sent += 1

    def finish(self) -> None:
        """Wait until every parameter's gradient is the sum over all processes."""
        while self.sent < len(self.buckets):
            self._send()
        for bucket in self.buckets:
            assert bucket.wait is not None
            bucket.wait()
            pairs = [
                (p.grad, view)
                for p, view in zip(bucket.parameters, bucket.views, strict=True)
                if p.grad is not None
            ]
            _copy(pairs)
            bucket.arrived, bucket.wait = 0, None
        self.sent = 0


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Give the first of each pair the second's values."""
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [values for _, values in pairs])


def _packed(parameters: Iterable[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Return the parameters in order, in groups of at least `limit` bytes but for the last, each of one type."""
    groups: list[list[nn.Parameter]] = []
    size = limit
    for parameter in parameters:
        if size >= limit or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return groups
