"""torchvision's detectors beside ours, a loss of one's own in every table, and the pyramid against the last map."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kernel_cases import torch_threads
from retinanet.anchors import anchors_of_image
from retinanet.batches import Batch, Targets
from retinanet.cli.main import main
from retinanet.data import open_dataset
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import ConfigError
from retinanet.folders import write_json
from retinanet.model import ModelSpec, PyramidSpec, build_retinanet, presets
from retinanet.objective import Objective, focal
from retinanet.paper import running, speed
from retinanet.paper.comparison import difference
from retinanet.paper.measuring import measure, timed, without_defaults
from retinanet.paper.own_loss import load_own_loss, name_of_own_loss
from retinanet.paper.peers import WEIGHTS, build_peer, judge, load_peer, seconds_of, train_peer
from retinanet.paper.results import Request, what_is_known
from retinanet.paper.running import Job, Store, job_of, run_one
from retinanet.paper.settings import SCALES, Setting, change_of, options_of
from retinanet.paper.settings import focal as focal_setting
from retinanet.paper.study_page import page_of
from retinanet.paper.tables import FINAL, PEERS, STUDIES, with_own_loss, with_peers
from retinanet.records import Classes
from retinanet.training.optimizer import hidden_weights
from retinanet.training.planning import plan_run
from retinanet.training.recipes import small

TINY = SCALES["tiny"]
OWN = """
from retinanet.losses import sigmoid_focal_loss

def loss(logits, targets, weight):
    return sigmoid_focal_loss(logits, targets, 0.5, 3.0, "sum", weight=weight)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return generate_shapes(folder, train=8, val=3, spec=ShapesSpec(image_size=96, empty_share=0.2))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "sharper.py"
    file.write_text(OWN)
    return file


def asked(data: Path, output: Path, **changes: object) -> Request:
    return replace(Request(TINY, data, output, seeds=2, rows=(), parallel=1), **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- peers


def spec_of(data: Path) -> ModelSpec:
    train = open_dataset(data, "train")
    setting = focal_setting(2)
    return plan_run(options_of(setting, TINY, str(data), seed=0), train, change_of(setting, 1.0)).spec


def batch(side: int = 160) -> Batch:
    """Two images: one with an object and an area to be ignored, one with nothing."""
    boxes = torch.zeros(2, 2, 4)
    boxes[0, 0], boxes[0, 1] = torch.tensor([20.0, 30, 70, 90]), torch.tensor([90.0, 90, 150, 150])
    targets = Targets(
        boxes, torch.zeros(2, 2, dtype=torch.int64), torch.tensor([[False, True], [False, False]])
    )
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return Batch(images, targets, (0, 1))


@pytest.mark.parametrize("name", list(PEERS.values()))
def test_a_peer_learns_a_batch_and_gives_our_detections(name: str, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = spec_of(data)
    peer = build_peer(name, spec)
    loss = peer.loss(batch(), torch.device("cpu"))
    assert torch.isfinite(loss)
    loss.backward()
    lacking = [key for key, value in peer.model.named_parameters() if value.grad is None]
    assert lacking == []
    found = peer.detect(np.full((60, 120, 3), 99, np.uint8))
    assert (found.width, found.height, found.classes) == (120, 60, spec.classes)
    if len(found):
        assert found.labels.min() >= 0
        assert found.labels.max() < len(spec.classes)
        assert (found.boxes[:, 2:] <= [120, 60]).all()


def test_ignored_boxes_are_no_targets_of_a_peer(data: Path) -> None:
    peer = build_peer("fcos", spec_of(data))
    given = {}

    class Spy(nn.Module):
        def forward(self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]) -> dict:
            given["targets"] = targets
            return {"loss": images[0].sum()}

    replace(peer, model=Spy()).loss(batch(), torch.device("cpu"))
    assert [len(target["boxes"]) for target in given["targets"]] == [1, 0]
    assert given["targets"][0]["labels"].tolist() == [0]
    with_background = replace(build_peer("ssd", spec_of(data)), model=Spy())
    with_background.loss(batch(), torch.device("cpu"))
    assert given["targets"][0]["labels"].tolist() == [1]


def test_images_reach_a_peer_as_they_are(data: Path) -> None:
    peer = build_peer("faster-rcnn", spec_of(data))
    image = torch.randn(3, 160, 96)
    images, _ = peer.model.transform.eval()([image])
    assert torch.equal(images.tensors[0], image)
    # SSD alone has one size, which ours is brought to.
    images, _ = build_peer("ssd", spec_of(data)).model.transform.eval()([image])
    assert images.tensors.shape == (1, 3, 160, 160)


@pytest.mark.parametrize(("width", "height"), [(240, 160), (160, 240), (160, 160)])
def test_ssd_learns_an_object_in_the_shape_in_which_it_is_to_find_it(
    data: Path, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch's canvas holds images of other shapes, too; a single image has none."""
    peer, seen = build_peer("ssd", spec_of(data)), []
    backbone = peer.model.backbone.forward

    def look(images: torch.Tensor) -> Any:
        inside = images[0, 0] > 0.5
        seen.append((inside.any(0).sum().item(), inside.any(1).sum().item()))
        return backbone(images)

    monkeypatch.setattr(peer.model.backbone, "forward", look)
    image = np.zeros((height, width, 3), np.uint8)
    image[40:80, 50:110] = 255
    normal = replace(peer.preprocessing, mean=(0.0,) * 3, std=(255.0,) * 3, image_size=160, max_size=240)
    peer = replace(peer, preprocessing=normal)
    canvas = torch.zeros(2, 3, 256, 256)  # of one that is wide and one that is high
    canvas[0, :, :height, :width] = torch.from_numpy(image).permute(2, 0, 1) / 255
    box = torch.tensor([[[50.0, 40.0, 110.0, 80.0]]] * 2)
    targets = Targets(box, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.bool))
    peer.loss(Batch(canvas, targets, (0, 1)), torch.device("cpu"))
    peer.detect(image)
    (wide, high), (found_wide, found_high) = seen
    assert wide / high == pytest.approx(1.5, abs=0.1)
    assert found_wide / found_high == pytest.approx(1.5, abs=0.1)
    if width != height:
        assert (found_wide, found_high) == (wide, high)


@pytest.mark.parametrize(
    ("width", "units", "regions", "proposals"), [(64, 256, 128, 500), (512, 1024, 512, 2000)]
)
def test_faster_rcnn_does_for_a_region_what_its_width_allows(
    data: Path, width: int, units: int, regions: int, proposals: int
) -> None:
    spec = spec_of(data)
    model = build_peer("faster-rcnn", replace(spec, pyramid=replace(spec.pyramid, channels=width))).model
    assert model.roi_heads.box_head.fc7.out_features == units
    assert model.roi_heads.box_predictor.cls_score.in_features == units
    assert model.roi_heads.box_predictor.cls_score.out_features == len(spec.classes) + 1
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == regions
    assert model.rpn.pre_nms_top_n() == model.rpn.post_nms_top_n() == proposals
    model.eval()
    assert model.rpn.pre_nms_top_n() == model.rpn.post_nms_top_n() == proposals // 2


def test_fcos_shares_objects_among_its_levels_as_the_anchors_do(data: Path) -> None:
    """In torchvision's, for anchors from 32 px, P3 is for objects up to 64 px."""
    spec = spec_of(data)
    assert spec.anchors.sizes[0] == 16
    sizes = build_peer("fcos", spec).model.anchor_generator.sizes
    assert sizes == ((4.0,), (8.0,), (16.0,), (32.0,), (64.0,))


def test_muon_leaves_outputs_and_fully_connected_layers_of_a_peer_alone(data: Path) -> None:
    peer = build_peer("faster-rcnn", spec_of(data))
    names = {id(value): name for name, value in peer.model.named_parameters()}
    inside = {names[id(weight)] for weight in hidden_weights(peer.model, peer.outputs)}
    assert any(name.startswith("rpn.head.conv") for name in inside)
    for part in ("cls_logits", "bbox_pred", "box_predictor", "box_head", "conv1"):
        assert not any(part in name for name in inside if "backbone.body" not in name), part
    assert not any(value.ndim == 2 for value in hidden_weights(peer.model, peer.outputs))


@pytest.mark.slow
def test_a_peer_trains_for_the_time_it_is_given(data: Path, tmp_path: Path) -> None:
    train, val = open_dataset(data, "train"), open_dataset(data, "val")
    setting = replace(focal_setting(2), peer="ssd")
    options = replace(options_of(setting, TINY, str(data), seed=0), batch_size=2)
    plan = plan_run(options, train, change_of(setting, 1.0))
    clock = seconds_of(torch.device("cpu"))
    began = clock()
    with torch_threads(
        1
    ):  # one that waits for another on a loaded machine spends processor time, which is measured
        done = train_peer("ssd", plan, train, val, 12.0, tmp_path / "run")
    assert done.steps > 1
    assert clock() - began < 20
    again = load_peer("ssd", plan.spec, tmp_path / "run", torch.device("cpu"))
    image = np.full((96, 96, 3), 40, np.uint8)
    assert np.array_equal(again.detect(image).boxes, done.peer.detect(image).boxes)
    kernels = [
        weight for weight in again.model.parameters() if weight.ndim == 4 and min(weight.shape[1:3]) > 1
    ]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    elsewhere = load_peer(
        "ssd", plan.spec, tmp_path / "run", torch.device("meta")
    )  # as on a device of its own
    assert {weight.device.type for weight in elsewhere.model.parameters()} == {"meta"}
    assert (tmp_path / "run" / WEIGHTS).exists()


def test_an_image_that_cannot_be_read_is_left_out_of_a_peers_figures(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    val = open_dataset(tmp_path / "data", "val")
    val.path(1).write_bytes(b"no image")
    found = judge(build_peer("ssd", spec_of(data)), val, 100)
    assert found.images == len(val) - 1
    assert "left out of the validation" in capsys.readouterr().out


def test_the_clock_of_a_cpu_stands_while_others_run() -> None:
    clock = seconds_of(torch.device("cpu"))
    began = clock()
    torch.randn(300, 300) @ torch.randn(300, 300)
    import time

    time.sleep(0.3)
    assert clock() - began < 0.25
    assert seconds_of(torch.device("cuda")) is time.monotonic


def fake(
    monkeypatch: pytest.MonkeyPatch, ap: dict[str | None, float], *, interrupted: bool = False
) -> list[Job]:
    ran: list[Job] = []

    def run_apart(job: Job, store: Store, *_: object) -> tuple[int, str]:
        ran.append(job)
        figures = dict.fromkeys(running.FIGURES, ap[job.setting.peer] + 0.01 * job.seed)
        store.file(job).parent.mkdir(parents=True, exist_ok=True)
        store.run(job).mkdir(parents=True, exist_ok=True)
        steps = {"steps": 450 + job.seed} if job.setting.peer else {}
        taken = {} if interrupted else {"seconds": 9.0, "own_seconds": 100.0 + 20 * job.seed}
        write_json(store.file(job), {**figures, **steps, **taken})
        return 0, ""

    monkeypatch.setattr(running, "_run_apart", run_apart)
    return ran


def test_table_2_trains_peers_for_as_long_as_ours(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = fake(monkeypatch, {None: 0.4, "faster-rcnn": 0.3, "ssd": 0.395, "fcos": 0.4})
    wanted = asked(data, tmp_path, peers=True, rows=("Faster R-CNN with FPN, R101", "SSD513, R101"))
    assert measure(["table2"], wanted, lambda _: None) == []
    ours = [job for job in ran if job.setting.peer is None]
    theirs = [job for job in ran if job.setting.peer]
    assert len(ours) == 4 + 2  # trained although --rows does not name it: it says how long
    assert {job.setting.peer for job in theirs} == {"faster-rcnn", "ssd"}
    assert len(theirs) == 2 * (4 + 2)
    assert ran[: len(ours)] == ours
    assert {job.seconds for job in theirs} == {130.0}
    study = wanted.study("table2")
    text = (tmp_path / "table2.md").read_text()
    (row,) = re.findall(r"\| ours over torchvision's Faster R-CNN with FPN \| (.*) \|", text)
    assert re.fullmatch(r"\+2\.9 \| \+10\.0 \| \+[\d.]+ to \+[\d.]+ \| as published", row)
    assert re.search(r"\| ours over torchvision's SSD \| \+7\.9 \| \+0\.5 \| -.* \| not told apart \|", text)
    means = "(on average 130 s, ours 130 s)"
    assert f"torchvision's Faster R-CNN with FPN took 451, 452 steps in our time {means}." in text
    numbers = json.loads((tmp_path / "table2.json").read_text())
    assert [pair["second"] for pair in numbers["against"]] == ["Faster R-CNN with FPN, R101", "SSD513, R101"]
    fcos = next(row for row in study.rows if row.name == "FCOS (2019)")
    assert fcos.setting is not None
    assert fcos.published.ap is None
    assert what_is_known(fcos.setting, wanted, Store(tmp_path)).rate is None
    assert page_of(study, wanted, Store(tmp_path)).name == "table2"


def test_a_peer_of_a_row_without_results_is_not_trained(data: Path, tmp_path: Path) -> None:
    wanted = asked(data, tmp_path, peers=True)
    job = wanted.job(replace(focal_setting(2), peer="ssd"), 1.0, 0)
    assert timed([job], wanted, Store(tmp_path)) == []


def test_peers_of_rows_whose_runs_were_all_interrupted_have_no_time(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = fake(monkeypatch, {None: 0.4}, interrupted=True)
    said: list[str] = []
    (failure,) = measure(["table2"], asked(data, tmp_path, peers=True, rows=("SSD513, R101",)), said.append)
    found = re.fullmatch(
        "ssd.*: how long ours took is not known, as its row has no result of a run that was never interrupted: "
        "remove (.*), and it is trained again",
        failure,
    )
    assert found is not None
    assert Path(found[1]).is_file()
    assert {job.setting.peer for job in ran} == {None}
    assert said[0].endswith(": AP 0.400")  # no minutes


def test_difference_by_hand() -> None:
    found = difference([0.30, 0.32, 0.34], [0.20, 0.22, 0.24])
    # Equal spreads 0.02: s^2/3 each, 4 degrees of freedom, t = 2.776
    half = 2.7764 * (2 * 0.02**2 / 3) ** 0.5
    assert found.mean == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1 + half, rel=1e-3)
    assert found.cells() == ("+10.0", "+5.5 to +14.5")
    # Nine at once, each with a ninth of the 5 %: t = 5.437
    wide = difference([0.30, 0.32, 0.34], [0.20, 0.22, 0.24], comparisons=9)
    assert wide.high == pytest.approx(0.1 + half * 5.4366 / 2.7764, rel=1e-3)
    assert difference([0.3], [0.31, 0.38]).cells() == ("-4.5", "")
    assert difference([0.3, 0.3], [0.2, 0.2]).low == pytest.approx(0.1)


def test_peers_belong_to_two_items(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["paper", "table1b", "--peers"])
    assert stop.value.code == 2
    assert "--peers belongs to table2 and fig2" in capsys.readouterr().err


def test_figure_2_shows_peers(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, {None: 0.4, "faster-rcnn": 0.3, "ssd": 0.39, "fcos": 0.4})
    wanted = asked(data, tmp_path, peers=True)
    measure(["table2"], wanted, lambda _: None)
    monkeypatch.setattr(speed, "_of_ours", lambda *_: 10.0)
    monkeypatch.setattr(speed, "load_peer", lambda name, *_: build_peer("ssd", spec_of(data)))
    page = speed.fig2(wanted)
    assert {"Faster R-CNN with FPN, R101", "SSD513, R101", "FCOS (2019)"} < set(page.numbers["milliseconds"])
    assert "50, 600 px: test_resnet at 160 px" in page.numbers["milliseconds"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PEERS.values()))
def test_a_run_of_a_peer_from_beginning_to_end(name: str, data: Path, tmp_path: Path) -> None:
    setting = replace(focal_setting(2), peer=name)
    job = replace(asked(data, tmp_path).job(setting, 1.0, 0), seconds=15.0)
    run_one(job, Store(tmp_path))
    found = Store(tmp_path).result(job)
    assert found is not None
    assert 0 <= found["ap"] <= 1
    assert found["steps"] > 0


# ---------------------------------------------------------------------------------- a loss of one's own


def test_a_loss_of_ones_own_is_trained_with(own: Path, data: Path) -> None:
    setting = replace(focal_setting(2), own_loss=(str(own), name_of_own_loss(own)))
    assert setting.key == name_of_own_loss(own)
    plan = plan_run(
        options_of(setting, TINY, str(data), seed=0), open_dataset(data, "train"), change_of(setting, 1.0)
    )
    logits, targets, weight = torch.randn(2, 7, 3), torch.randint(-1, 3, (2, 7)), torch.rand(2, 7)
    expected = focal(0.5, 3.0)(logits, targets, weight)
    assert torch.equal(plan.objective.class_loss(logits, targets, weight), expected)
    assert any(value == "one of your own, prior 0.01" for _, value, _ in plan.reasons)
    json.dumps(plan.to_json())
    job = asked(data, own.parent).job(setting, 1.0, 0)
    assert job_of(json.dumps({**vars(job), "setting": vars(setting)})) == job


def test_an_edited_loss_has_other_results_and_stops_runs_of_the_old_one(own: Path, data: Path) -> None:
    before = name_of_own_loss(own)
    setting = replace(focal_setting(2), own_loss=(str(own), before))
    own.write_text(OWN.replace("3.0", "4.0"))
    assert name_of_own_loss(own) != before
    with pytest.raises(ConfigError, match="was edited since the tables were begun"):
        run_one(asked(data, own.parent).job(setting, 1.0, 0), Store(own.parent))


def test_every_table_gets_the_row(own: Path, data: Path, tmp_path: Path) -> None:
    wanted = asked(data, tmp_path, own_loss=(str(own), name_of_own_loss(own)))
    for name in STUDIES:
        assert wanted.study(name).rows[-1].name == "yours: sharper"
        assert wanted.study(name).rows[:-1] == STUDIES[name](TINY).rows
    both = with_own_loss(with_peers(STUDIES["table2"](TINY)), (str(own), name_of_own_loss(own)))
    keys = [row.setting.key for row in both.rows if row.setting]
    assert len(set(keys)) == len(keys) == 5
    # With the network and the images of the rows beside it.
    usual, of_paper = focal_setting(2), SCALES["paper"]
    for name, scale, beside in (
        ("table1a", TINY, usual),
        ("table1e", TINY, usual),
        ("table1d", of_paper, replace(usual, deep=True)),
        (
            "table2",
            of_paper,
            next(row.setting for row in STUDIES["table2"](of_paper).rows if row.name == FINAL),
        ),
    ):
        own_row = with_own_loss(STUDIES[name](scale), (str(own), name_of_own_loss(own))).rows[-1].setting
        assert own_row is not None
        assert replace(own_row, own_loss=None) == beside


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "needs a Python file; .* does not exist"),
        ("def loss(:", "cannot be run: SyntaxError"),
        ("import nowhere_at_all", "cannot be run: ModuleNotFoundError"),
        ("gamma = 2", "needs a function `loss"),
        ("def loss(a, b): return a.sum()", "fails on logits .*: TypeError"),
        ("def loss(l, t, w): return l.sum()", "which is 0 where every weight is"),
        ("def loss(l, t, w): return (l * w[..., None]).sum(-1)", "fails on logits .*: RuntimeError"),
        ("def loss(l, t, w): return (l * w[..., None]).sum() / 0", "one finite number"),
        ("def loss(l, t, w): return (l.detach() * w[..., None]).sum()", "fails on logits .*: RuntimeError"),
    ],
)
def test_what_is_no_loss_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_own_loss(file)


def test_a_wrong_loss_is_one_line_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["paper", "table3", "--own-loss", str(tmp_path / "none.py"), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["paper", "fig1", "--own-loss", "mine.py"])
    assert "--own-loss belongs to items that are measured" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- the last map alone


def test_the_last_map_has_the_anchors_of_all_levels(data: Path) -> None:
    setting = next(row.setting for row in STUDIES["pyramid"](TINY).rows if row.name == "C5 alone")
    assert setting is not None
    train = open_dataset(data, "train")
    plan = plan_run(options_of(setting, TINY, str(data), seed=0), train, change_of(setting, 1.0))
    usual = plan_run(
        options_of(focal_setting(2), TINY, str(data), seed=0), train, change_of(focal_setting(2), 1.0)
    )
    sides = {
        round(float((shape[0] * shape[1]) ** 0.5), 3)
        for level in range(5)
        for shape in usual.spec.anchors.shapes(level)
    }
    of_last = plan.spec.anchors.shapes(0)
    assert {round(float((shape[0] * shape[1]) ** 0.5), 3) for shape in of_last} == sides
    assert plan.spec.anchors.per_location == 45
    network = build_retinanet(plan.spec)
    images = torch.zeros(1, 3, 96, 160)
    predictions = network(images)
    assert predictions.grids == ((3, 5),)
    assert predictions.logits[0].shape == (1, 3 * 5 * 45, len(train.classes))
    (anchors,) = anchors_of_image(plan.spec.anchors, 96, 160)
    assert len(anchors) == 3 * 5 * 45
    targets = Targets(
        anchors[None, :1].clone(), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool)
    )
    losses = Objective(anchors=plan.spec.anchors, coding=plan.spec.coding)(
        predictions, targets, height=96, width=160
    )
    losses.total.backward()
    assert all(value.grad is not None for value in network.pyramid.parameters())


def test_a_spec_of_the_last_map_is_read_again_and_needs_its_stride() -> None:
    usual = presets.paper(Classes(("a",)))
    anchors = replace(usual.anchors, sizes=(32.0,), strides=(32,))
    spec = replace(usual, pyramid=PyramidSpec(levels="c5"), anchors=anchors)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    with pytest.raises(ConfigError, match=r"needs anchors on C5, strides \(32,\)"):
        replace(usual, pyramid=PyramidSpec(levels="c5"))
    with pytest.raises(ConfigError, match="needs anchors on P3-P7"):
        replace(usual, anchors=anchors)


# ---------------------------------------------------------------------------------- what names results


def test_a_new_setting_that_is_off_leaves_results_where_they_are() -> None:
    recipe = small(Classes(("a",)), "test_resnet", "cpu")
    values = without_defaults(recipe)
    assert values["lr"] == 0.004
    assert "freeze" not in values  # as it is by default
    assert "class_loss" not in values
    assert values["model"]["head"] == {"norm": "group"}
    assert without_defaults(replace(recipe, freeze="stem"))["freeze"] == "stem"
    assert without_defaults(Setting()) == {}
    json.dumps(values)
