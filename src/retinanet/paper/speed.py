"""Figure 2: speed against accuracy, from the rows of Table 1e."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from retinanet.data import open_dataset
from retinanet.devices import choose_device
from retinanet.errors import ConfigError
from retinanet.images import UInt8Array, decode
from retinanet.inference import load
from retinanet.paper.comparison import Interval, Spread
from retinanet.paper.page import COLOURS, Page, Picture, Table, new_figure
from retinanet.paper.peers import load_peer
from retinanet.paper.results import Measured, Request, common_spread, what_is_known
from retinanet.paper.running import Store
from retinanet.paper.settings import options_of
from retinanet.paper.tables import PEERS, STAND_INS, table1e, table2, with_peers
from retinanet.training.planning import plan_run

# The other detectors of the paper's figure: AP and milliseconds on an M40.
OTHERS = {
    "YOLOv2": (21.6, 25),
    "SSD321": (28.0, 61),
    "DSSD321": (28.0, 85),
    "R-FCN (extrapolated)": (29.9, 85),
    "SSD513": (31.2, 125),
    "DSSD513": (33.2, 156),
    "FPN Faster R-CNN": (36.2, 172),
}
# Images looked at before the clock starts, and those of which the median is taken.
WARM, TIMED = 3, 20


def fig2(request: Request) -> Page:
    """Figure 2: AP over milliseconds an image, published, and of the rows of Table 1e that are trained; with `peers`
    torchvision's detectors beside them.
    """
    store, study = Store(request.output), table1e(request.scale)
    known: dict[str, tuple[Measured, float]] = {}
    for row in study.rows:
        assert row.setting is not None  # all of Table 1e can be trained
        found = what_is_known(row.setting, request, store)
        if found.rate is not None and found.results:
            run = store.model(request.job(row.setting, found.rate, 0))
            known[row.name] = found, _of_ours(run, str(request.data))
    peers = _peers(request, store) if request.peers else {}
    if not known and not peers:
        raise ConfigError(
            f"fig2 needs rows of table1e with their models, of which none is in {request.output}: "
            f"{request.command('table1e')}"
        )
    spread = common_spread(found for found, _ in known.values())
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2)
    rows: list[tuple[str, str, str, str, str]] = []
    for axes, deep, colour in ((left, False, COLOURS[0]), (left, True, COLOURS[1])):
        of = [row.published for row in study.rows if row.setting is not None and row.setting.deep == deep]
        _line(
            axes, [p.ms or 0 for p in of], [p.ap or 0 for p in of], colour, f"RetinaNet-{101 if deep else 50}"
        )
    for name, (ap, there) in OTHERS.items():
        left.plot(there, ap, "s", color="#888888", markersize=5)
        beside = {"xytext": (-5, -2), "ha": "right"} if name == "SSD321" else {"xytext": (4, -9)}
        left.annotate(name, (there, ap), textcoords="offset points", fontsize=7, **beside)
    left.set(title="published: COCO test-dev, M40", xlim=(0, 260))
    for deep, colour in ((False, COLOURS[0]), (True, COLOURS[1])):
        of_depth = [
            row for row in study.rows if row.name in known and row.setting and row.setting.deep == deep
        ]
        means = [_mean(known[row.name][0], spread) for row in of_depth]
        speeds = [known[row.name][1] for row in of_depth]
        name = request.scale.deep if deep else request.scale.base
        if of_depth:
            _line(right, speeds, [100 * mean.mean for mean in means], colour, name)
            for ms, mean in zip(speeds, means, strict=True):
                _spread(right, ms, mean, colour)
    for row in study.rows:
        published = (f"{row.published.ap:.1f}", f"{row.published.ms:.0f}")
        here = ("-", "-")
        if row.name in known:
            found, ms = known[row.name]
            here = (_mean(found, spread).percent(), f"{ms:.1f}")
        rows.append((row.name, *published, *here))
    rows += [(name, f"{ap:.1f}", f"{ms}", "-", "-") for name, (ap, ms) in OTHERS.items()]
    for (name, (found, ms)), mark in zip(peers.items(), "sD^", strict=False):
        mean, called = _mean(found), STAND_INS[PEERS[name]]
        right.plot(ms, 100 * mean.mean, mark, color="#888888", markersize=7, label=called)
        _spread(right, ms, mean, "#888888")
        rows.append((called, "-", "-", mean.percent(), f"{ms:.1f}"))
    right.set(title="measured here, val", xlim=(0, None))
    for axes in (left, right):
        axes.set(xlabel="milliseconds an image", ylabel="AP, %")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="best")
    return Page(
        "fig2",
        "Figure 2: speed against accuracy",
        (
            "Each line joins image sizes of one depth, those of Table 1e; in the paper RetinaNet is above all others "
            f"from 64 ms on. Measured: AP on val as in table1e, and the median time of {TIMED} images, one at a time, "
            "from pixels to boxes, on this machine. The paper's times are of an M40; its figure prints 73 ms for "
            "RetinaNet-50 at 500 px, where Table 1e says 72.",
            Picture(figure, "AP over the time of an image. Upright lines: 95 % intervals of the mean."),
            Table(("row", "AP, paper", "ms, paper", "AP", "ms an image"), rows),
        ),
        {"milliseconds": {name: ms for name, (_, ms) in {**known, **peers}.items()}},
    )


def _of_ours(run: Path, data: str) -> float:
    detector = load(run)
    return milliseconds(lambda image: detector.predict([image]), data)


def _peers(request: Request, store: Store) -> dict[str, tuple[Measured, float]]:
    """Return what is known of torchvision's detectors, the rows of Table 2, by their names there."""
    known = {}
    for row in with_peers(table2(request.scale)).rows:
        if row.setting is None or row.setting.peer is None:
            continue
        found = what_is_known(row.setting, request, store)
        if found.rate is not None and found.results:
            job = request.job(row.setting, found.rate, 0)
            options = options_of(
                job.setting, request.scale, job.data, seed=job.seed, pretrained=job.pretrained
            )
            train = open_dataset(job.data, "train")
            spec = plan_run(options, train, job.change).spec
            peer = load_peer(row.setting.peer, spec, store.model(job), choose_device("auto"))
            known[row.name] = found, milliseconds(peer.detect, job.data)
    return known


def milliseconds(detect: Callable[[UInt8Array], object], data: str) -> float:
    """Return the median time that a detector takes for one image of val that is decoded already."""
    dataset = open_dataset(data, "val")
    times = []
    for index in islice(range(len(dataset)), WARM + TIMED):
        image = decode(dataset.path(index))
        began = time.perf_counter()
        detect(image)
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times[min(WARM, len(times) - 1) :]))


def _mean(found: Measured, spread: Spread | None = None) -> Interval:
    mean = found.of("ap", spread)
    assert mean is not None  # it has results
    return mean


def _spread(axes: Axes, ms: float, mean: Interval, colour: str) -> None:
    axes.errorbar(ms, 100 * mean.mean, yerr=100 * (mean.half or 0), color=colour, capsize=3, linewidth=1)


def _line(axes: Axes, x: list[float], y: list[float], colour: str, name: str) -> None:
    axes.plot(x, y, "o-", color=colour, linewidth=1.8, markersize=5, label=name)
