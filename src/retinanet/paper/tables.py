"""The tables of the paper: published values, and the settings that measure the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from retinanet.paper.settings import PeerName, Scale, Setting, cross_entropy, focal, focal_star, mined


@dataclass(frozen=True)
class Published:
    """What the paper prints of a row: COCO AP in percent, milliseconds on an M40; None where it prints nothing.

    `said` is what it says in words in the place of AP.
    """

    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    ms: float | None = None
    said: str = "-"


@dataclass(frozen=True)
class Row:
    """A row: its name, how it is trained here (None: published only), and what was published."""

    name: str
    setting: Setting | None
    published: Published


@dataclass(frozen=True)
class Study:
    """A table or an experiment of the paper.

    Args:
        about: what it shows, and what is different here.
        figures: the columns, besides AP.
        ordered: whether the order of the published rows means something that measured rows can reproduce.
        stars: gamma and beta of the rows of FL*, whose losses are drawn over x_t.
        against: rows whose difference is told: one, and another that in the paper it is above or beside.
        here: what rows are called among what is measured, where that is another thing than what was published.
    """

    name: str
    title: str
    about: str
    rows: Sequence[Row]
    figures: Sequence[str] = ("ap50", "ap75")
    ordered: bool = True
    stars: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    against: Sequence[tuple[str, str]] = ()
    here: Mapping[str, str] = field(default_factory=dict)


def table1a(scale: Scale) -> Study:
    """Table 1a: alpha of the balanced cross entropy."""
    published = {
        0.1: (0.0, 0.0, 0.0),
        0.25: (10.8, 16.0, 11.7),
        0.5: (30.2, 46.7, 32.8),
        0.75: (31.1, 49.4, 33.0),
        0.9: (30.8, 49.7, 32.3),
        0.99: (28.7, 47.4, 29.9),
        0.999: (25.1, 41.7, 26.1),
    }
    return Study(
        "table1a",
        "Table 1a: alpha for cross entropy",
        "Alpha-balanced cross entropy (Eq. 3), gamma 0. The paper finds that with the prior of 0.01 training is stable "
        "without any balance, and that a weight of 0.75 for objects helps a little.",
        [Row(f"alpha {alpha:g}", cross_entropy(alpha), Published(*ap)) for alpha, ap in published.items()],
        against=[(f"alpha {0.75:g}", f"alpha {other:g}") for other in (0.1, 0.25, 0.5, 0.999)],
    )


def table1b(scale: Scale) -> Study:
    """Table 1b: gamma of the focal loss, each with its best alpha."""
    published = {
        (0.0, 0.75): (31.1, 49.4, 33.0),
        (0.1, 0.75): (31.4, 49.9, 33.1),
        (0.2, 0.75): (31.9, 50.7, 33.4),
        (0.5, 0.5): (32.9, 51.7, 35.2),
        (1.0, 0.25): (33.7, 52.0, 36.2),
        (2.0, 0.25): (34.0, 52.5, 36.5),
        (5.0, 0.25): (32.2, 49.6, 34.8),
    }
    return Study(
        "table1b",
        "Table 1b: gamma for the focal loss",
        "The focal loss (Eq. 5) with the alpha that the paper found best for each gamma; gamma 0 is cross entropy.",
        [
            Row(f"gamma {gamma:g}, alpha {alpha:g}", focal(gamma, alpha), Published(*ap))
            for (gamma, alpha), ap in published.items()
        ],
        against=[
            ("gamma 2, alpha 0.25", "gamma 0, alpha 0.75"),
            ("gamma 2, alpha 0.25", "gamma 5, alpha 0.25"),
        ],
    )


def table1c(scale: Scale) -> Study:
    """Table 1c: anchors a location."""
    published = {
        (1, 1): (30.3, 49.0, 31.8),
        (2, 1): (31.9, 50.0, 34.0),
        (3, 1): (31.8, 49.4, 33.7),
        (1, 3): (32.4, 52.3, 33.9),
        (2, 3): (34.2, 53.1, 36.5),
        (3, 3): (34.0, 52.5, 36.5),
        (4, 3): (33.8, 52.1, 36.2),
    }
    return Study(
        "table1c",
        "Table 1c: scales and ratios of anchors",
        "Anchor sizes a level (2^(k / n) for k < n) times aspect ratios (1, or 1:2, 1:1 and 2:1).",
        [
            Row(f"{scales} x {ratios}", replace(focal(2), scales=scales, ratios=ratios), Published(*ap))
            for (scales, ratios), ap in published.items()
        ],
        against=[("3 x 3", "1 x 1"), ("4 x 3", "3 x 3")],
    )


def table1d(scale: Scale) -> Study:
    """Table 1d: the focal loss against OHEM."""
    published = {
        ("ohem", 128, 0.7): (31.1, 47.2, 33.2),
        ("ohem", 256, 0.7): (31.8, 48.8, 33.9),
        ("ohem", 512, 0.7): (30.6, 47.0, 32.6),
        ("ohem", 128, 0.5): (32.8, 50.3, 35.1),
        ("ohem", 256, 0.5): (31.0, 47.4, 33.0),
        ("ohem", 512, 0.5): (27.6, 42.0, 29.2),
        ("ohem-1to3", 128, 0.5): (31.1, 47.2, 33.2),
        ("ohem-1to3", 256, 0.5): (28.3, 42.4, 30.3),
        ("ohem-1to3", 512, 0.5): (24.0, 35.5, 25.8),
    }
    deep = scale.name == "paper"
    names = {"ohem": "OHEM", "ohem-1to3": "OHEM 1:3"}
    rows = [
        Row(
            f"{names[loss]}, batch {batch}, NMS {nms:g}",
            replace(mined("ohem" if loss == "ohem" else "ohem-1to3", batch, nms), deep=deep),
            Published(*ap),
        )
        for (loss, batch, nms), ap in published.items()
    ]
    about = (
        "Cross entropy of the hardest anchors after NMS by their loss, and of three negatives for every positive, "
        "against the focal loss on all of them. What is mined is the class loss, from each image by itself; NMS is of "
        "the anchors. Boxes are learned from all positives, and both are divided by their number, as with the focal "
        "loss (the paper says none of this)."
    )
    if scale.name == "tiny":
        about += (
            " Of OHEM 1:3 a batch bounds the positives, by a quarter of it; where no image has more than 32 of them, "
            "as of shapes-tiny, its three batches are one and the same training."
        )
    if not deep:
        about += f" The paper's rows are of ResNet-101; here the network is that of the other tables, {scale.base}."
    rows.append(Row("FL, gamma 2, alpha 0.25", replace(focal(2), deep=deep), Published(36.0, 54.9, 38.7)))
    # The paper's best of each kind.
    best = ("OHEM, batch 128, NMS 0.5", "OHEM, batch 256, NMS 0.7", "OHEM 1:3, batch 128, NMS 0.5")
    against = [(rows[-1].name, one) for one in best]
    return Study(
        "table1d", "Table 1d: the focal loss against online hard example mining", about, rows, against=against
    )


def table1e(scale: Scale) -> Study:
    """Table 1e: depth and image size against accuracy and speed."""
    published = {
        (False, 400): (30.5, 47.8, 32.7, 11.2, 33.8, 46.1, 64),
        (False, 500): (32.5, 50.9, 34.8, 13.9, 35.8, 46.7, 72),
        (False, 600): (34.3, 53.2, 36.9, 16.2, 37.4, 47.4, 98),
        (False, 700): (35.1, 54.2, 37.7, 18.0, 39.3, 46.4, 121),
        (False, 800): (35.7, 55.0, 38.5, 18.9, 38.9, 46.3, 153),
        (True, 400): (31.9, 49.5, 34.1, 11.6, 35.8, 48.5, 81),
        (True, 500): (34.4, 53.1, 36.8, 14.7, 38.5, 49.1, 90),
        (True, 600): (36.0, 55.2, 38.7, 17.4, 39.6, 49.7, 122),
        (True, 700): (37.1, 56.6, 39.8, 19.1, 40.6, 49.4, 154),
        (True, 800): (37.8, 57.5, 40.8, 20.2, 41.1, 49.2, 198),
    }
    rows = []
    for (deep, side), values in published.items():
        setting = replace(focal(2), deep=deep, side=side)
        here = f"{scale.deep if deep else scale.base} at {scale.pixels(setting)} px"
        rows.append(Row(f"{101 if deep else 50}, {side} px: {here}", setting, Published(*values)))
    names = [row.name for row in rows]
    return Study(
        "table1e",
        "Table 1e: depth and image size",
        "Published: AP on test-dev. Measured beside it: the scale's two backbones at sides in about the same "
        "proportions, multiples of 32. What an image takes is in fig2.",
        rows,
        figures=("ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ms"),
        # More pixels, and a deeper network at the same ones.
        against=[(names[2], names[0]), (names[4], names[0]), (names[7], names[2])],
    )


def table2(scale: Scale) -> Study:
    """Table 2: the final model among other detectors."""
    published = {
        "Faster R-CNN+++, R101-C4": (34.9, 55.7, 37.4, 15.6, 38.7, 50.9),
        "Faster R-CNN with FPN, R101": (36.2, 59.1, 39.0, 18.2, 39.0, 48.2),
        "Faster R-CNN by G-RMI, Inception-ResNet-v2": (34.7, 55.5, 36.7, 13.5, 38.1, 52.0),
        "Faster R-CNN with TDM": (36.8, 57.7, 39.2, 16.2, 39.8, 52.1),
        "YOLOv2, DarkNet-19": (21.6, 44.0, 19.2, 5.0, 22.4, 35.5),
        "SSD513, R101": (31.2, 50.4, 33.3, 10.2, 34.5, 49.8),
        "DSSD513, R101": (33.2, 53.3, 35.2, 13.0, 35.4, 51.1),
        "RetinaNet, R101": (39.1, 59.1, 42.3, 21.8, 42.7, 50.2),
        "RetinaNet, ResNeXt-101": (40.8, 61.1, 44.1, 24.1, 44.2, 51.2),
    }
    about = (
        "The final model is deeper, sees 800 px with scale jitter, and trains 1.5 times as long. The other rows are "
        "published values."
    )
    final = replace(focal(2), deep=True, side=800, jitter=True)
    if scale.name == "tiny":
        final = focal(2)
        about += f" At this scale the measured model is that of the other tables, {scale.base}."
    return Study(
        "table2",
        "Table 2: the final model",
        about,
        [Row(name, final if name == FINAL else None, Published(*ap)) for name, ap in published.items()],
        figures=("ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
        ordered=False,
    )


# The row of Table 2 that is trained, and torchvision's detectors by the row that they stand in with --peers; FCOS is
# younger than the paper.
FINAL = "RetinaNet, R101"
PEERS: dict[str, PeerName] = {
    "Faster R-CNN with FPN, R101": "faster-rcnn",
    "SSD513, R101": "ssd",
    "FCOS (2019)": "fcos",
}
STAND_INS: dict[PeerName, str] = {
    "faster-rcnn": "torchvision's Faster R-CNN with FPN",
    "ssd": "torchvision's SSD",
    "fcos": "torchvision's FCOS",
}


def with_peers(study: Study) -> Study:
    """Return Table 2 with torchvision's Faster R-CNN, SSD and FCOS trained beside ours."""
    ours = next(row.setting for row in study.rows if row.name == FINAL)
    assert ours is not None
    rows = [
        replace(row, setting=replace(ours, peer=PEERS[row.name])) if row.name in PEERS else row
        for row in study.rows
    ]
    known = {row.name for row in rows}
    rows += [
        Row(name, replace(ours, peer=peer), Published()) for name, peer in PEERS.items() if name not in known
    ]
    about = study.about.replace("The other rows are published values.", OF_PEERS)
    here = {FINAL: "ours", **{name: STAND_INS[peer] for name, peer in PEERS.items()}}
    return replace(study, about=about, rows=rows, against=[(FINAL, name) for name in PEERS], here=here)


OF_PEERS = (
    "Beside it torchvision's Faster R-CNN with FPN (two stages), SSD and FCOS, trained here for as long as ours on the "
    "same images, with the same backbone, augmentation, optimiser, averaged weights and rates to choose from; heads, "
    "sampling, losses and post-processing are torchvision's, without our fast paths for them, so that in the "
    "same time a step of ours may be one of several. Their anchors, of FCOS the ranges of its levels, begin where ours "
    "do; their pyramids have a norm, as torchvision's newer models, where ours has none. In a pyramid "
    "narrower than 256 channels Faster R-CNN has as much fewer proposals, sampled regions and units for each. SSD sees "
    "all images padded to squares of one size. The other rows are published values."
)


def with_own_loss(study: Study, own: tuple[str, str]) -> Study:
    """Return a study with a loss of one's own, `Setting.own_loss`, as its last row, with the network and the images of
    the row that is most like the usual focal loss."""
    usual = asdict(focal(2))
    settings = [row.setting for row in study.rows if row.setting is not None and row.setting.peer is None]
    nearest = max(settings, key=lambda one: sum(usual[name] == value for name, value in asdict(one).items()))
    setting = replace(nearest, loss=focal(2).loss, told=focal(2).told, own_loss=own)
    row = Row(f"yours: {Path(own[0]).stem}", setting, Published())
    return replace(study, rows=[*study.rows, row])


def table3(scale: Scale) -> Study:
    """Table 3: the other form of the focal loss."""
    return Study(
        "table3",
        "Table 3: FL and FL*",
        "The paper finds that the exact form of the focal loss is not what matters (Appendix A): FL* does as well. "
        "alpha is 0.25, and 0.75 for cross entropy.",
        [
            Row("CE", cross_entropy(0.75), Published(31.1, 49.4, 33.0)),
            Row("FL, gamma 2", focal(2), Published(34.0, 52.5, 36.5)),
            Row("FL*, gamma 2, beta 1", focal_star(2, 1), Published(33.8, 52.7, 36.3)),
            Row("FL*, gamma 4, beta 0", focal_star(4, 0), Published(33.9, 51.8, 36.4)),
        ],
        against=[
            ("FL, gamma 2", "CE"),
            ("FL*, gamma 2, beta 1", "CE"),
            ("FL*, gamma 4, beta 0", "CE"),
            ("FL, gamma 2", "FL*, gamma 2, beta 1"),
        ],
    )


def prior(scale: Scale) -> Study:
    """The prior: what initialisation is worth (Sections 3.3 and 4.1)."""
    return Study(
        "prior",
        "Initialisation with a prior",
        "In the paper every class score starts at 0.01 (the bias of the last convolution is -log((1 - pi) / pi)), so "
        "that the background does not swamp the first steps: without it, at 0.5, its training with cross entropy "
        "diverged at once; with it, and without any balance, it gave 30.2 AP.",
        [
            Row("CE, pi 0.01", cross_entropy(0.5), Published(30.2, 46.7, 32.8)),
            Row("CE, pi 0.5 (no prior)", replace(cross_entropy(0.5), prior=0.5), Published(said="diverged")),
            Row("FL, pi 0.01", focal(2), Published(34.0, 52.5, 36.5)),
            Row("FL, pi 0.5 (no prior)", replace(focal(2), prior=0.5), Published()),
        ],
        ordered=False,
        against=[("CE, pi 0.01", "CE, pi 0.5 (no prior)"), ("FL, pi 0.01", "FL, pi 0.5 (no prior)")],
    )


def pyramid(scale: Scale) -> Study:
    """The pyramid: P3 to P7 against the backbone's last map alone (Section 4)."""
    return Study(
        "pyramid",
        "The pyramid against the last map",
        "The paper reports low AP, without a figure, from the features of the final ResNet layer alone. Here that row "
        "has C5 at stride 32, a 1x1 and a 3x3 convolution, the same heads, and the anchors of all five levels on the "
        "one map: 45 a location.",
        [
            Row("P3 to P7", focal(2), Published(34.0, 52.5, 36.5)),
            Row("C5 alone", replace(focal(2), last_map=True), Published(said="low")),
        ],
        figures=("ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
        ordered=False,
        against=[("P3 to P7", "C5 alone")],
    )


def hinge(scale: Scale) -> Study:
    """The hinge loss on p_t (Section 5.1)."""
    names = {margin: f"hinge, zero above p_t {margin:g}" for margin in (0.5, 0.9)}
    return Study(
        "hinge",
        "The hinge loss",
        'The paper tried a hinge loss that "sets loss to 0 above a certain value of p_t", and found it unstable, '
        "without meaningful results. Here it is max(0, m - p_t), zero above p_t = m.",
        [
            *(
                Row(name, Setting(loss="hinge", told=(("margin", margin),)), Published(said="meaningless"))
                for margin, name in names.items()
            ),
            Row("FL, gamma 2", focal(2), Published(34.0, 52.5, 36.5)),
        ],
        ordered=False,
        against=[("FL, gamma 2", name) for name in names.values()],
    )


def fig7(scale: Scale) -> Study:
    """Figure 7: FL* over gamma and beta."""
    stars = {f"FL*, gamma {g:g}, beta {b:g}": (g, b) for g in (1.0, 2.0, 4.0) for b in (0.0, 1.0, 2.0)}
    # Of Table 3; with gamma 1 and beta 0 it is cross entropy with alpha 0.25, of Table 1a.
    published = {
        (1.0, 0.0): Published(10.8, 16.0, 11.7),
        (2.0, 1.0): Published(33.8, 52.7, 36.3),
        (4.0, 0.0): Published(33.9, 51.8, 36.4),
    }
    return Study(
        "fig7",
        "Figure 7: FL* over gamma and beta",
        "The paper draws the settings of FL* with more than 33.5 AP in blue: those that lower the weight of what is "
        "classified correctly, x_t > 0. Here a setting is blue where it is above cross entropy with alpha 0.75 by more "
        "than the seeds explain, all settings together.",
        [
            Row("CE", cross_entropy(0.75), Published(31.1, 49.4, 33.0)),
            *(Row(name, focal_star(*star), published.get(star, Published())) for name, star in stars.items()),
        ],
        ordered=False,
        stars=stars,
    )


STUDIES = {
    "table1a": table1a,
    "table1b": table1b,
    "table1c": table1c,
    "table1d": table1d,
    "table1e": table1e,
    "table2": table2,
    "table3": table3,
    "prior": prior,
    "pyramid": pyramid,
    "hinge": hinge,
    "fig7": fig7,
}
