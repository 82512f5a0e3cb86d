"""Where a network starts: fresh weights, a backbone's weights, or a whole model with other classes."""

from __future__ import annotations

import torch
from torch import Tensor

from retinanet.checkpoint import Model
from retinanet.model import RetinaNet, build_retinanet, load_backbone
from retinanet.records import Classes
from retinanet.training.plan import Plan

# The tensors in which every class has places of its own.
OF_CLASSES = ("class_head.last.weight", "class_head.last.bias")


def build_network(plan: Plan, *, load: bool = True) -> RetinaNet:
    """Build the plan's network: fresh weights by the seed, then those of the model or of the backbone's file.

    Args:
        load: those of the files; False where a training state is going to bring them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.options.seed)
        network = build_retinanet(plan.spec, prior=plan.recipe.prior)
    if load and plan.start is not None:
        start_from(plan.start, network, plan.spec.classes)
    elif load and plan.weights_file is not None:
        load_backbone(network.backbone, plan.weights_file)
    network.backbone.freeze(plan.recipe.freeze)
    return network


def start_from(model: Model, network: RetinaNet, classes: Classes) -> None:
    """Give a network of the same architecture a model's weights; classes are the same where their names are.

    A class that the model does not know keeps the fresh weights of the network; one that it alone knows is dropped.
    """
    state = model.network.state_dict()
    known = model.spec.classes
    pairs = [(i, known.names.index(name)) for i, name in enumerate(classes.names) if name in known.names]
    for name in OF_CLASSES:
        fresh = network.state_dict()[name]
        state[name] = _with_rows_of(state[name], fresh, pairs, len(known), len(classes))
    network.load_state_dict(state)


def _with_rows_of(
    old: Tensor, fresh: Tensor, pairs: list[tuple[int, int]], known: int, classes: int
) -> Tensor:
    """Return `fresh`, `[A classes, ...]`, with the rows (new, old) of `old`, `[A known, ...]`, for every anchor."""
    filled = fresh.clone()
    of_fresh, of_old = filled.unflatten(0, (-1, classes)), old.unflatten(0, (-1, known))
    for new, place in pairs:
        of_fresh[:, new] = of_old[:, place]
    return filled
