r"""Train torchvision's RetinaNet on a data set for a given time and judge it as `retinanet evaluate` does.

    python bench/torchvision_training.py runs/demo-shapes-4000-0 --time 300
    python bench/torchvision_training.py BCCD --backbone resnet18 --channels 256 --image-size 240 --time 1200 \
        --keep bccd

The peer gets what is known to suit it from scratch: GroupNorm in pyramid and heads (and in a ResNet's backbone; timm's
small `test_resnet` has BatchNorm only, here as in the demo), AdamW at 1e-3 with warm-up and cosine, flips, anchors
from 16 px, images decoded once and kept in memory, which is not counted, steps in bf16 where the CPU computes in it,
the validation in fp32 as ours. The schedule follows the clock, so that all of the time is used, whatever a step takes;
as much is left as the validation will need. The last line is JSON.
`--keep NAME` adds it to `docs/recipes.md`, beside what the recipe reaches on the data set that the sweep calls so.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial

import numpy as np
import recipes
import timm
import torch
import torchvision
from timm.layers.norm import GroupNorm
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from retinanet.data import Dataset, open_dataset
from retinanet.devices import autocast
from retinanet.evaluation import evaluate_detections
from retinanet.images import decode
from retinanet.records import Detections

CPU = torch.device("cpu")
# Share of the time in which the rate rises.
WARM = 0.05
# Images by which the time of the validation is estimated.
LOOKED_AT = 4


class Features(nn.Module):
    """A timm backbone under torchvision's pyramid, with P6 and P7 from C5."""

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        norm = {"norm_layer": GroupNorm} if name.startswith("resnet") else {}
        self.body = timm.create_model(name, features_only=True, out_indices=(2, 3, 4), **norm)
        widths = self.body.feature_info.channels()
        top = LastLevelP6P7(widths[-1], channels)
        top.use_P5 = False
        self.pyramid = FeaturePyramidNetwork(
            widths, channels, extra_blocks=top, norm_layer=partial(nn.GroupNorm, 32)
        )
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.pyramid({str(i): level for i, level in enumerate(self.body(images))})


def build(name: str, channels: int, classes: int, size: int, smallest: int, most: int) -> RetinaNet:
    body = Features(name, channels)
    sizes = tuple(tuple(smallest * 2**level * 2 ** (i / 3) for i in range(3)) for level in range(5))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    head = RetinaNetHead(channels, 9, classes, norm_layer=partial(nn.GroupNorm, 32))
    return RetinaNet(
        body,
        classes,
        min_size=size,
        max_size=2 * size,
        anchor_generator=anchors,
        head=head,
        detections_per_img=most,
    )


def read(dataset: Dataset) -> list[tuple[Tensor, dict[str, Tensor]]]:
    examples = []
    for i in range(len(dataset)):
        image = decode(dataset.path(i))
        truth = dataset.ground_truth(i)
        target = {"boxes": torch.tensor(truth.boxes), "labels": torch.tensor(truth.classes)}
        examples.append((torch.from_numpy(image.copy()).permute(2, 0, 1), target))
    return examples


def flipped(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    width = image.shape[2]
    boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    return image.flip(2), {**target, "boxes": boxes}


@torch.inference_mode()
def found_in(model: RetinaNet, dataset: Dataset, indices: range) -> list[Detections]:
    """Return what a model finds in some images of a data set."""
    model.eval()
    found = []
    for i in indices:
        image = torch.from_numpy(decode(dataset.path(i)).copy()).permute(2, 0, 1) / 255
        (one,) = model([image])
        found.append(
            Detections(
                boxes=one["boxes"].numpy(),
                scores=one["scores"].numpy(),
                labels=one["labels"].numpy(),
                classes=dataset.classes,
                width=image.shape[2],
                height=image.shape[1],
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--time", type=float, default=300, help="seconds, reading the images not counted")
    parser.add_argument("--backbone", default="test_resnet", help="timm name")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--smallest-anchor", type=int, default=16)
    parser.add_argument("--max-detections", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep",
        metavar="NAME",
        help="what bench/recipes.py calls the data set; the row stands beside runs of the recipe's own length",
    )
    options = parser.parse_args()

    train, val = open_dataset(options.data, "train"), open_dataset(options.data, "val")
    examples = read(train)
    torch.manual_seed(options.seed)
    model = build(
        options.backbone,
        options.channels,
        len(train.classes),
        options.image_size,
        options.smallest_anchor,
        options.max_detections,
    )
    draw = np.random.default_rng(options.seed)
    order: list[int] = []

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)

    def step() -> float:
        if len(order) < options.batch_size:
            order.extend(draw.permutation(len(examples)).tolist())
        batch = [examples[order.pop()] for _ in range(options.batch_size)]
        batch = [flipped(*example) if draw.random() < 0.5 else example for example in batch]
        with autocast(CPU, "auto"):
            losses = model([image / 255 for image, _ in batch], [target for _, target in batch])
        loss = sum(losses.values())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    began = time.monotonic()
    found_in(model, val, range(min(LOOKED_AT, len(val))))
    each = (time.monotonic() - began) / min(LOOKED_AT, len(val))
    training = options.time - each * len(val)
    if training <= 0:
        parser.error(
            f"--time {options.time:g} is too short: the validation alone takes {each * len(val):.0f} s"
        )
    model.train()
    steps = 0
    while (share := (time.monotonic() - began) / training) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, share / WARM) * (1 + math.cos(math.pi * share)) / 2
        loss = step()
        if steps % 50 == 0:
            print(f"step {steps}, {share:.0%} of the time, loss {loss:.3f}", flush=True)
        steps += 1
    found = found_in(model, val, range(len(val)))
    taken = time.monotonic() - began
    truths = [val.ground_truth(i) for i in range(len(val))]
    metrics = evaluate_detections(truths, found, val.classes, max_detections=options.max_detections).to_json()
    figures = {key: metrics[key] for key in ("ap", "ap50", "ap_small", "ap_medium", "ap_large")}
    images = steps * options.batch_size
    settings = {**vars(options), "torch": torch.__version__, "torchvision": torchvision.__version__}
    print(json.dumps({**figures, "seconds": round(taken), "images_seen": images, **settings}))
    if options.keep:
        minutes = options.time / 60
        what = (
            f"torchvision's RetinaNet in {minutes:.3g} minutes: {images:,} images of {options.image_size} px, anchors "
            f"from {options.smallest_anchor} px, AdamW at {options.lr:g}"
        )
        job = recipes.Job(
            options.keep,
            f"torchvision-{minutes:.3g}m",
            options.seed,
            images=None,
            backbone=options.backbone,
            channels=options.channels,
        )
        threads = torch.get_num_threads()
        row = recipes.row_of(job, what=what, metrics=figures, seconds=taken, threads=threads)
        recipes.keep(row)


if __name__ == "__main__":
    main()
