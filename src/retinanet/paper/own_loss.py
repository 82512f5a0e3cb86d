"""A class loss of one's own as a row of every table: a Python file that defines `loss(logits, targets, weight)`.

    from retinanet.losses import sigmoid_focal_loss

    def loss(logits, targets, weight):
        return sigmoid_focal_loss(logits, targets, 0.5, 3.0, "sum", weight=weight)

It is `retinanet.objective.ClassLoss`: logits `[B, R, K]` of one level of the pyramid, class indices `[B, R]` (negative:
no object), weight `[B, R]` (0 where an anchor is ignored) -> the weighted sum over anchors and classes. The file is run
as Python, like any script that one starts.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch

from retinanet.errors import ConfigError
from retinanet.objective import ClassLoss


def name_of_own_loss(path: Path) -> str:
    """Return the name of its results: that of the file, and of what is in it."""
    return f"own-{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def load_own_loss(path: Path) -> ClassLoss:
    """Return the function `loss` of a file, tried on a few numbers.

    Raises:
        ConfigError: the file is missing or fails, defines no `loss`, or what that returns is no loss: one finite
            number with a gradient, 0 where every weight is 0.
    """
    if not path.is_file():
        raise ConfigError(f"--own-loss needs a Python file; {path} does not exist")
    found = importlib.util.spec_from_file_location(f"own_loss_{path.stem}", path)
    if found is None or found.loader is None:
        raise ConfigError(f"--own-loss needs a Python file, .py; got {path}")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise ConfigError(f"--own-loss {path} cannot be run: {type(error).__name__}: {error}") from error
    loss = getattr(module, "loss", None)
    if not callable(loss):
        raise ConfigError(
            f"--own-loss {path} needs a function `loss(logits, targets, weight)`; it defines none"
        )
    own: ClassLoss = loss
    _try(own, path)
    return own


def _try(loss: ClassLoss, path: Path) -> None:
    logits = torch.linspace(-3, 3, 2 * 5 * 3).reshape(2, 5, 3).requires_grad_()
    targets = torch.tensor([[-1, 0, 1, 2, -1], [2, -1, -1, -1, 0]])
    try:
        for weight in (torch.ones(2, 5), torch.zeros(2, 5)):
            value = loss(logits, targets, weight)
            (slope,) = torch.autograd.grad(value, logits)
            sound = value.shape == () and bool(torch.isfinite(value)) and bool(torch.isfinite(slope).all())
            if not sound or (not weight.any() and (value != 0 or slope.any())):
                raise ConfigError(
                    f"--own-loss {path}: `loss` needs to return one finite number, the weighted sum, which is 0 where "
                    f"every weight is; got {value.detach()} for weights of {weight[0, 0]:g}"
                )
    except ConfigError:
        raise
    except Exception as error:  # whatever the function does
        raise ConfigError(
            f"--own-loss {path}: `loss` fails on logits [2, 5, 3], class indices [2, 5] and weights [2, 5]: "
            f"{type(error).__name__}: {error}"
        ) from error
