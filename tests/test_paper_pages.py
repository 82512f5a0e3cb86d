"""Figures and explanations of the paper: what their numbers say, what is written, and the command."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from retinanet.cli.main import main
from retinanet.model import BackboneSpec, ModelSpec, build_retinanet
from retinanet.paper import architecture, curves, explanations, imbalance
from retinanet.paper.items import ITEMS
from retinanet.paper.page import Page, Picture, Table, new_figure, write_page
from retinanet.paper.tables import STUDIES
from retinanet.records import Classes


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
        assert [line.split()[0] for line in out.splitlines()] == [*ITEMS, *STUDIES]


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
