"""Figures and explanations of the paper: what their numbers say, what is written, and the command."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from retinanet.anchors import AnchorSpec, all_anchors_of_image
from retinanet.batches import MatchState
from retinanet.checkpoint import Model, load_model, save_model
from retinanet.cli.main import main
from retinanet.data import open_dataset, write_coco
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import ConfigError, DataError
from retinanet.images import Preprocessing, decode
from retinanet.losses import sigmoid_focal_loss
from retinanet.matching import match_anchors
from retinanet.model import BackboneSpec, ModelSpec, PyramidSpec, build_retinanet
from retinanet.paper import architecture, balance, curves, explanations, imbalance, loss_shares
from retinanet.paper.items import ITEMS, OF_RESULTS
from retinanet.paper.loss_shares import hardest_share, in_words
from retinanet.paper.page import Page, Picture, Table, new_figure, write_page
from retinanet.paper.tables import STUDIES
from retinanet.records import Classes, GroundTruth


def tables(page: Page) -> list[Table]:
    return [part for part in page.parts if isinstance(part, Table)]


def column(table: Table, name: str) -> list[float]:
    return [float(row[list(table.head).index(name)].replace(",", "")) for row in table.rows]


@pytest.mark.parametrize("name", ITEMS)
def test_every_item_is_written_and_reads_alike_in_all_forms(name: str, tmp_path: Path) -> None:
    page = ITEMS[name].make() if name != "setting" else imbalance.setting(images=5)
    assert page.name == name
    files = write_page(page, tmp_path)
    assert [file.name for file in files[:3]] == [f"{name}.md", f"{name}.html", f"{name}.json"]
    pictures = [file for file in files if file.suffix == ".png"]
    assert len(pictures) == sum(isinstance(part, Picture) for part in page.parts) == (name != "setting")
    markdown = (tmp_path / f"{name}.md").read_text()
    html = (tmp_path / f"{name}.html").read_text()
    values = json.loads((tmp_path / f"{name}.json").read_text())
    assert markdown.startswith(f"# {page.title}\n")
    assert re.findall(r"\]\((.+?)\)", markdown) == [file.name for file in pictures]
    assert html.count("data:image/png;base64,") == len(pictures)
    assert "http" not in html.replace("http-equiv", "")
    assert values["item"] == name
    for table, kept in zip(tables(page), values["tables"], strict=True):
        assert [list(row.values()) for row in kept] == [list(row) for row in table.rows]
        for row in table.rows:
            assert len(row) == len(table.head)
            assert "| " + " | ".join(row) + " |" in markdown
            assert all(f"<td>{cell}</td>" in html for cell in row)


def test_figure_4_says_what_it_finds_of_what_the_paper_says() -> None:
    said = in_words({"positives": [0.247, 0.3, 0.35, 0.39], "negatives": [0.09, 0.2, 0.5, 0.76]})
    assert "here they have 25 to 39 %, so that the half is not seen here." in said
    assert "the hardest hundredth has 9 % of it at gamma 0, and 76 % at gamma 2." in said
    assert "the half is seen here, too." in in_words({"positives": [0.45, 0.55], "negatives": [0.1, 0.9]})


def test_the_same_page_is_the_same_files(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_page(ITEMS["iou"].make(), tmp_path / folder)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_text_is_escaped(tmp_path: Path) -> None:
    page = Page("x", "a < b", ["p < q", Table(("<h>",), [("&",)]), Picture(new_figure(1, 1), "<c>")])
    write_page(page, tmp_path)
    html = (tmp_path / "x.html").read_text()
    assert "<h1>a &lt; b</h1>" in html
    assert "<p>p &lt; q</p>" in html
    assert "<th>&lt;h&gt;</th>" in html
    assert "<td>&amp;</td>" in html
    assert "<figcaption>&lt;c&gt;</figcaption>" in html


def test_iou_grades() -> None:
    (table,) = tables(explanations.iou_page())
    assert column(table, "IoU") == [0.4034, 0.7330, 0.9264]


def test_giou_of_boxes_at_one_l1_distance() -> None:
    (table,) = tables(explanations.giou_page())
    assert column(table, "L1 distance") == pytest.approx([9.07] * 3, abs=0.005)
    # Deltas above 1 cost |x| - 0.5, the others x^2 / 2: |-5.04|, |-.725|, |-1.457|, |-1.848| and so on.
    assert column(table, "smooth L1") == pytest.approx([7.11, 7.32, 7.45], abs=0.005)
    assert column(table, "IoU") == pytest.approx([0.27, 0.59, 0.66], abs=0.005)
    assert column(table, "GIoU") == pytest.approx([0.24, 0.59, 0.62], abs=0.005)


def test_nms_keeps_one_box_of_each_object() -> None:
    (table,) = tables(explanations.nms_page())
    assert column(table, "kept score") == [0.95, 0.85, 0.5]
    dropped = [row[2] for row in table.rows]
    assert re.findall(r"(0\.\d\d) \(IoU", " ".join(dropped)) == ["0.90", "0.71", "0.62"]
    assert dropped[-1] == "none"
    assert all(float(iou) > 0.5 for iou in re.findall(r"IoU (0\.\d\d)", " ".join(dropped)))


def test_ap_by_hand() -> None:
    page = explanations.ap_page()
    (table,) = tables(page)
    # Right at ranks 1, 2, 4, 6 and 9, of 6 objects.
    assert column(table, "precision") == pytest.approx(
        [1, 1, 2 / 3, 3 / 4, 3 / 5, 4 / 6, 4 / 7, 4 / 8, 5 / 9, 5 / 10], abs=5e-4
    )
    # Levels 0 .. 1/3: 1; .. 1/2: 3/4; .. 2/3: 2/3; .. 5/6: 5/9; beyond nothing.
    expected = (34 * 1 + 17 * 0.75 + 16 * 2 / 3 + 17 * 5 / 9) / 101
    assert page.numbers["ap"] == pytest.approx(expected)


def test_smooth_l1_table() -> None:
    (table,) = tables(explanations.smooth_l1_page())
    assert column(table, "smooth L1, beta 1") == [0.005, 0.125, 0.5, 1.5]
    assert column(table, "beta 1/9") == pytest.approx([0.045, 0.444, 0.944, 1.944], abs=5e-4)


def test_the_figures_of_section_3_2() -> None:
    (table,) = tables(curves.fig1())
    ratio = dict(zip(column(table, "p_t"), column(table, "CE / FL, gamma 2"), strict=True))
    assert ratio[0.9] == pytest.approx(100)
    assert 950 < ratio[0.968] < 1050
    assert ratio[0.5] == pytest.approx(4)
    assert ratio[0.25] < 4


def test_derivatives_of_figure_6() -> None:
    (table,) = tables(curves.fig6())
    assert [row[0] for row in table.rows] == [
        "CE",
        "FL, gamma 2",
        "FL*, gamma 2, beta 1",
        "FL*, gamma 4, beta 0",
    ]
    at_zero = column(table, "x_t = 0")
    star = 1 / (1 + math.exp(-1))
    assert at_zero == pytest.approx([-0.5, 0.25 * (math.log(0.5) - 0.5), star - 1, -0.5], abs=1e-3)


def test_easy_and_hard_examples() -> None:
    page = curves.inliers()
    sums, effects = tables(page)
    assert column(sums, "50 easy") == [50, 31.6, 20]
    assert column(sums, "5 hard") == [25, 24.8, 24.7]
    # alpha_t (1 - p_t)^2: what is frequent and classified well loses most, what is rare and misclassified least.
    assert column(effects, "FL / CE") == [0.0025, 0.0075, 0.2025, 0.6075]
    assert list(page.numbers["ratios"].values()) == pytest.approx([0.0025, 0.0075, 0.2025, 0.6075])


def test_the_architecture_is_the_papers() -> None:
    page = architecture.fig3()
    maps, parameters, anchors = tables(page)
    assert [row[0] for row in maps.rows] == ["C3", "C4", "C5", "P3", "P4", "P5", "P6", "P7"]
    assert maps.rows[0] == ("C3", "8", "512", "100 x 100")
    assert maps.rows[-1] == ("P7", "128", "256", "7 x 7")
    assert page.numbers["anchors"] == sum(column(anchors, "anchors")) == 120_087
    assert page.numbers["smallest"] == 32
    assert round(page.numbers["largest"]) == 813
    assert anchors.rows[0][-1] == "32, 40, 51"
    convolution = 256 * 256 * 9 + 256
    assert page.numbers["parameters"]["box head"] == 4 * convolution + 256 * 36 * 9 + 36
    assert page.numbers["parameters"]["class head"] == 4 * convolution + 256 * 720 * 9 + 720
    assert parameters.rows[-1][1] == f"{sum(page.numbers['parameters'].values()):,}"


def test_the_architecture_of_any_model() -> None:
    spec = ModelSpec(Classes(("a", "b")), backbone=BackboneSpec("test_resnet"))
    page = architecture.fig3(spec, side=256)
    network = build_retinanet(spec)
    assert sum(page.numbers["parameters"].values()) == sum(p.numel() for p in network.parameters())
    found = network(torch.zeros(1, 3, 256, 256))
    assert page.numbers["anchors"] == sum(logits.shape[1] for logits in found.logits)


# ---------------------------------------------------------------------------------- the command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["paper", *arguments])
    return int(stopped.value.code or 0), *capsys.readouterr()


def test_list_names_every_item(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("list",)):
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()] == [*ITEMS, *OF_RESULTS, *STUDIES]


def test_items_are_made_where_one_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "iou", "fig1", "iou", "--output", str(tmp_path / "p"))
    assert code == 0
    assert out.splitlines() == [
        f"{name}: {tmp_path / 'p' / name}.md (.html, .json, {name}.png)" for name in ("iou", "fig1")
    ]
    assert len(list((tmp_path / "p").iterdir())) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fig99",), r"paper has no item 'fig99'.* `retinanet paper list` names all"),
        (("gio",), "Did you mean 'giou'"),
        (("list", "iou"), "`retinanet paper list` stands alone; got other items as well"),
    ],
)
def test_wrong_items(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert re.search(message, err)


# ---------------------------------------------------------------------------------- figure 4


def test_shares_of_the_hardest_by_hand() -> None:
    losses = np.array([0, 0, 1, 1, 2, 2, 4, 10, 20, 60], np.float32)
    assert hardest_share(losses, 0.2) == pytest.approx(0.8)
    assert hardest_share(losses, 0.01) == pytest.approx(0.6)  # at least one
    assert hardest_share(losses * 0, 0.2) == 0


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "data"
    return generate_shapes(folder, train=1, val=5, spec=ShapesSpec(image_size=96))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    spec = ModelSpec(
        Classes(("square", "disk", "triangle")),
        backbone=BackboneSpec("test_resnet"),
        pyramid=PyramidSpec(channels=64),
        anchors=AnchorSpec(sizes=(16.0, 32.0, 64.0, 128.0, 256.0)),
        preprocessing=Preprocessing(image_size=96, max_size=96),
    )
    network = build_retinanet(spec)
    torch.nn.init.normal_(network.class_head.last.weight, std=0.5)
    return save_model(tmp_path_factory.mktemp("model"), Model(network, spec))


def test_the_losses_of_a_model_are_those_of_its_anchors(shapes: Path, model: Path) -> None:
    dataset, loaded = open_dataset(shapes, "val"), load_model(model)
    windows = loss_shares.losses_of(loaded, dataset)
    assert windows.images == 5
    # Image by image, with the classes in the model's order, which is not the data's.
    positives: list[Tensor] = []
    negatives: list[Tensor] = []
    anchors = all_anchors_of_image(loaded.spec.anchors, 96, 96)
    for index in range(5):
        truth = dataset.ground_truth(index)
        pixels, _ = loaded.spec.preprocessing.prepare(decode(dataset.path(index)))
        with torch.no_grad():
            found = loaded.network.eval()(torch.from_numpy(pixels)[None])
        logits = torch.cat(found.logits, dim=1)[0]
        matches = match_anchors(anchors, torch.from_numpy(truth.boxes.copy()).reshape(-1, 4))
        names = [loaded.spec.classes.names.index(dataset.classes.names[k]) for k in truth.classes]
        for of, state in ((positives, MatchState.POSITIVE), (negatives, MatchState.NEGATIVE)):
            rows = torch.nonzero(matches.state == state)[:, 0]
            label = torch.full((len(rows),), -1)
            if state == MatchState.POSITIVE:
                label = torch.tensor([names[i] for i in matches.index[rows]], dtype=torch.int64)
            of.append(sigmoid_focal_loss(logits[rows], label, 0.25, 2).sum(dim=1))
    for found_here, expected in ((windows.positives, positives), (windows.negatives, negatives)):
        wanted = torch.cat(expected).sort().values.numpy()
        np.testing.assert_allclose(found_here[loss_shares.GAMMAS.index(2)], wanted, rtol=1e-3, atol=1e-6)
        assert (np.diff(found_here, axis=1) >= 0).all()
    # A larger gamma moves the loss of the negatives to the hardest.
    shares = [hardest_share(losses, 0.01) for losses in windows.negatives]
    assert shares == sorted(shares)


def test_an_image_is_not_padded_to_those_beside_it(model: Path, tmp_path: Path) -> None:
    """Padding is background, and easy."""
    loaded, sizes, files = load_model(model), [(96, 48), (48, 96)], ["wide.png", "high.png"]
    for size, file in zip(sizes, files, strict=True):
        Image.new("RGB", size, "gray").save(tmp_path / file)
    write_coco(
        tmp_path / "instances_val.json",
        classes=loaded.spec.classes,
        files=files,
        sizes=sizes,
        ground_truths=[GroundTruth(np.array([[8, 8, 40, 40]], np.float32), np.array([0]))] * 2,
    )
    windows = loss_shares.losses_of(loaded, open_dataset(tmp_path, "val"))
    alone = len(all_anchors_of_image(loaded.spec.anchors, 64, 96))  # 48 is padded to 64
    assert windows.images == 2
    assert alone < windows.negatives.shape[1] <= 2 * alone


def test_of_very_many_negatives_a_part_is_drawn(
    shapes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, loaded = open_dataset(shapes, "val"), load_model(model)
    whole = loss_shares.losses_of(loaded, dataset)
    monkeypatch.setattr(loss_shares, "MOST_NEGATIVES", 1000)
    part = loss_shares.losses_of(loaded, dataset)
    assert 800 < part.negatives.shape[1] < 1200 < whole.negatives.shape[1]
    np.testing.assert_array_equal(part.positives, whole.positives)


def test_fig4_of_a_model_of_ones_own(
    capsys: pytest.CaptureFixture[str], shapes: Path, model: Path, tmp_path: Path
) -> None:
    code, out, _ = run(
        capsys, "fig4", "--model", str(model), "--data", str(shapes), "--output", str(tmp_path)
    )
    assert code == 0
    assert out.splitlines() == [f"fig4: {tmp_path / 'fig4'}.md (.html, .json, fig4.png)"]
    values = json.loads((tmp_path / "fig4.json").read_text())
    assert values["gammas"] == [0, 0.5, 1, 2]
    assert len(values["shares"]["negatives"]) == 4
    assert values["images"] == 5
    # The val split is enough.
    (shapes / "annotations" / "instances_train.json").rename(tmp_path / "away.json")
    try:
        code, _, err = run(
            capsys, "fig4", "--model", str(model), "--data", str(shapes), "--output", str(tmp_path)
        )
    finally:
        (tmp_path / "away.json").rename(shapes / "annotations" / "instances_train.json")
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fig4", "--model", "x"), "--model needs --data, whose val split the model is looked at with"),
        (("iou", "--model", "x"), "--model belongs to fig4"),
        (("fig4", "--rows", "CE"), "--rows belongs to items that are measured"),
    ],
)
def test_wrong_requests_of_fig4(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err


def test_fig4_without_a_model_needs_a_trained_row(
    capsys: pytest.CaptureFixture[str], shapes: Path, tmp_path: Path
) -> None:
    code, _, err = run(capsys, "fig4", "--data", str(shapes), "--output", str(tmp_path))
    assert code == 2
    assert "the row `gamma 2` of table1b, which is not trained yet" in err


def test_fig4_needs_the_models_classes_and_objects(shapes: Path, model: Path, tmp_path: Path) -> None:
    loaded = load_model(model)
    other = dataclasses.replace(
        loaded, spec=dataclasses.replace(loaded.spec, classes=Classes(("disk", "cat", "dog")))
    )
    with pytest.raises(ConfigError, match="it knows disk, cat, dog, and not square, triangle"):
        loss_shares.losses_of(other, open_dataset(shapes, "val"))
    empty = generate_shapes(tmp_path / "d", train=0, val=2, spec=ShapesSpec(image_size=96, empty_share=1.0))
    with pytest.raises(DataError, match="fig4 needs objects that anchors reach"):
        loss_shares.losses_of(loaded, open_dataset(empty, "val"))


def test_the_playground_is_in_the_page_and_needs_nothing_else(tmp_path: Path) -> None:
    write_page(ITEMS["inliers"].make(), tmp_path)
    html = (tmp_path / "inliers.html").read_text()
    for name in ("gamma", "alpha", "easy", "sure", "hard", "lost"):
        assert f'<input id="{name}" type="range"' in html
    assert "<script>" in html
    assert not re.search(r"(?:src|href)=.(?!data:)", html)
    markdown = (tmp_path / "inliers.md").read_text()
    assert "sliders for gamma, alpha" in markdown
    assert "<script" not in markdown


def test_shares_of_the_loss_by_what_is_done_about_the_imbalance() -> None:
    shares = balance.sampling().numbers["shares"]
    for share in shares.values():
        assert sum(share.values()) == pytest.approx(1)
    easy = {way: share["easy background"] for way, share in shares.items()}
    assert easy["all, cross entropy"] > 0.8
    assert easy["all, alpha 0.75"] > 0.6
    assert easy["all, focal loss"] < 0.6
    assert shares["all, focal loss"]["hard background"] > 8 * shares["all, cross entropy"]["hard background"]
    # 64 objects were drawn of 192 background anchors, of which one in 700 is hard.
    assert shares["256 at random, 1:3"]["objects"] > 0.8
    assert shares["256 at random, 1:3"]["hard background"] < 0.1
    assert easy["OHEM, the hardest 128"] == 0


def test_the_loss_of_the_first_step() -> None:
    at = torch.tensor([0.5, 0.01], dtype=torch.float64)
    background, objects = balance.first_loss(at, None, 0.0)
    assert objects.tolist() == pytest.approx([math.log(2), -math.log(0.01)])
    assert background[0] == pytest.approx(math.log(2) * (8e6 - 50) / 50)
    assert background[1] == pytest.approx(-math.log(0.99) * (8e6 - 50) / 50)
    assert 60 < float(background[0] / background[1]) < 80  # "70 times less"
    background, objects = balance.first_loss(at, 0.25, 2.0)
    assert background[1] == pytest.approx(0.75 * 0.01**2 * -math.log(0.99) * (8e6 - 50) / 50)
    assert objects[1] > background[1]  # "the objects make up most of the first step"
