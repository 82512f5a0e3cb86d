"""`Detector`: a model that takes images as people have them and gives detections in their pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinanet.anchors import anchors_of_image
from retinanet.checkpoint import Model, load_model
from retinanet.devices import Precision, autocast, choose_device
from retinanet.errors import ConfigError, ImageError
from retinanet.images import Geometry, ImageSource, decode
from retinanet.inference.post_processing import Found, post_process
from retinanet.model import PostProcessing
from retinanet.preparing import prepare_batch
from retinanet.records import Detections, Float32Array

Input: TypeAlias = ImageSource | Tensor

# What `predict` uses for a class without a threshold chosen on validation data.
DEFAULT_THRESHOLD = 0.3
# Images decoded ahead of the network, in batches: enough to hide decoding, little enough to bound memory.
BATCHES_AHEAD = 2


class Detector:
    """Run a model on images.

    Args:
        model: from `load_model`, or a network in training with its spec.
        device: "auto" takes CUDA where there is one.
        precision: "fp32", "bf16", or "auto": bf16 where the device computes it natively.
        max_detections: overrides the spec's cap.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: str = "auto",
        precision: Precision = "fp32",
        max_detections: int | None = None,
    ) -> None:
        self.model = model
        self.spec = model.spec
        self.device = choose_device(device)
        self.precision = precision
        self.network = model.network.to(self.device).to(memory_format=torch.channels_last)
        self.max_detections = (
            self.spec.post_processing.max_detections if max_detections is None else max_detections
        )
        self._options()  # refuses an impossible cap here and not at the first image

    def predict(
        self,
        images: Input | Sequence[Input],
        *,
        threshold: float | None = None,
        batch_size: int | None = None,
        bgr: bool = False,
    ) -> list[Detections]:
        """Return the detections of every image, in order; always a list.

        Args:
            images: one image or several: paths, encoded bytes, PIL images, RGB uint8 arrays `[H, W, 3]`, or
                tensors `[3, H, W]` (uint8, or floating in [0, 1]).
            threshold: keep scores of at least this. By default each class has the threshold of its best F1 on
                validation data where the model holds one, else 0.3.
            batch_size: images that meet the network together; it does not change what is found.
            bgr: arrays are in OpenCV's order.
        """
        several = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
        return list(
            self.stream(
                cast(Sequence[Input], images) if several else [cast(Input, images)],
                threshold=threshold,
                batch_size=batch_size,
                bgr=bgr,
            )
        )

    def stream(
        self,
        images: Iterable[Input],
        *,
        threshold: float | None = None,
        batch_size: int | None = None,
        bgr: bool = False,
    ) -> Iterator[Detections]:
        """Yield the detections of each image, in order, with bounded memory; see `predict`."""
        for found in self.detect(images, threshold=threshold, batch_size=batch_size, bgr=bgr):
            if isinstance(found, ImageError):
                raise found
            yield found

    def detect(
        self,
        images: Iterable[Input],
        *,
        threshold: float | None = None,
        batch_size: int | None = None,
        bgr: bool = False,
    ) -> Iterator[Detections | ImageError]:
        """As `stream`, but an image that cannot be read gives its error in its place and ends nothing."""
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigError(f"threshold needs [0, 1]; got {threshold}")
        limits = self._thresholds(threshold)
        options = self._options().lowered(float(limits.min()))
        for found in self._run(images, batch_size, bgr, options):
            yield (
                found if isinstance(found, ImageError) else found.select(found.scores >= limits[found.labels])
            )

    def _thresholds(self, threshold: float | None) -> Float32Array:
        if threshold is not None:
            return np.full(len(self.spec.classes), threshold, np.float32)
        return self.model.operating_points.threshold_per_class(self.spec.classes, DEFAULT_THRESHOLD)

    def detect_all(
        self, images: Iterable[Input], *, batch_size: int | None = None, bgr: bool = False
    ) -> Iterator[Detections | ImageError]:
        """Yield everything above the spec's score threshold, or an image's error: what evaluation judges."""
        return self._run(images, batch_size, bgr, self._options())

    def _options(self) -> PostProcessing:
        return self.spec.post_processing.capped(self.max_detections)

    def _run(
        self, images: Iterable[Input], batch_size: int | None, bgr: bool, options: PostProcessing
    ) -> Iterator[Detections | ImageError]:
        size = (8 if self.device.type == "cuda" else 1) if batch_size is None else batch_size
        if size < 1:
            raise ConfigError(f"batch_size needs at least 1; got {batch_size}")
        remaining = iter(images)
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="decode") as pool:
            ahead: list[list[Future[_Prepared]]] = []
            while True:
                while len(ahead) < BATCHES_AHEAD:
                    ahead.append(
                        [pool.submit(self._prepare, image, bgr) for image in islice(remaining, size)]
                    )
                if not ahead[0]:
                    return
                yield from self._detect_batch([_result(future) for future in ahead.pop(0)], options)

    def _prepare(self, image: Input, bgr: bool) -> _Prepared:
        pixels = decode(_to_array(image) if isinstance(image, Tensor) else image, bgr=bgr)
        images, (geometry,) = prepare_batch([pixels], self.spec.preprocessing)
        return images, geometry

    def _detect_batch(
        self, prepared: list[_Prepared | ImageError], options: PostProcessing
    ) -> list[Detections | ImageError]:
        """Run images of equal padded size together, so that no image's padding depends on its neighbours."""
        results: list[Detections | ImageError | None] = [None] * len(prepared)
        groups: dict[torch.Size, list[int]] = {}
        for i, item in enumerate(prepared):
            if isinstance(item, ImageError):
                results[i] = item
            else:
                groups.setdefault(item[0].shape, []).append(i)
        for members in groups.values():
            items = [cast(_Prepared, prepared[i]) for i in members]
            for i, found in zip(members, self._detect_group(items, options), strict=True):
                results[i] = found
        return cast(list[Detections | ImageError], results)

    def _detect_group(self, items: list[_Prepared], options: PostProcessing) -> list[Detections]:
        """Find objects in images of one size, in halves where a CUDA device has no memory for all at once."""
        try:
            return self._detect_together(items, options)
        except torch.cuda.OutOfMemoryError:
            if len(items) == 1:
                height, width = items[0][0].shape[2:]
                raise ConfigError(
                    f"no memory left on {self.device} for one image of {width} x {height} (width x height); use "
                    "--device cpu, or a model of a smaller --image-size"
                ) from None
        torch.cuda.empty_cache()  # out of the handler: the error keeps what was computed
        half = len(items) // 2
        return self._detect_group(items[:half], options) + self._detect_group(items[half:], options)

    @torch.no_grad()
    def _detect_together(self, items: list[_Prepared], options: PostProcessing) -> list[Detections]:
        images = items[0][0] if len(items) == 1 else torch.cat([image for image, _ in items])
        images = images.to(self.device, memory_format=torch.channels_last)
        self.network.eval()
        with autocast(self.device, self.precision):
            predictions = self.network(images)
        height, width = images.shape[2:]
        found = post_process(
            predictions,
            anchors_of_image(self.spec.anchors, height, width, self.device),
            [geometry.resized for _, geometry in items],
            coding=self.spec.coding,
            options=options,
        )
        return [self._record(one, geometry) for one, (_, geometry) in zip(found, items, strict=True)]

    def _record(self, found: Found, geometry: Geometry) -> Detections:
        width, height = geometry.original
        return Detections(
            boxes=geometry.to_original(found.boxes.cpu().numpy()),
            scores=found.scores.cpu().numpy(),
            labels=found.labels.cpu().numpy(),
            classes=self.spec.classes,
            width=width,
            height=height,
        )


# An image [1, 3, H, W] with its padding, and the way back from it.
_Prepared: TypeAlias = tuple[Tensor, Geometry]


def _result(future: Future[_Prepared]) -> _Prepared | ImageError:
    try:
        return future.result()
    except ImageError as error:
        return error


def _to_array(image: Tensor) -> NDArray[np.uint8]:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ImageError(f"a tensor image needs shape [3, H, W] or [1, H, W]; got {list(image.shape)}")
    if image.is_floating_point():
        if not (image.isfinite().all() and image.min() >= 0 and image.max() <= 1):
            raise ImageError(
                f"a floating tensor image needs values in [0, 1]; got {image.min():g} to {image.max():g}"
            )
        image = (image * 255).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise ImageError(f"a tensor image needs uint8, or floating values in [0, 1]; got {image.dtype}")
    return cast(NDArray[np.uint8], image.permute(1, 2, 0).cpu().contiguous().numpy())


def load(path: str | Path, *, device: str = "auto", precision: Precision = "fp32") -> Detector:
    """Return a detector from a run directory, model directory or model file."""
    return Detector(load_model(path), device=device, precision=precision)
