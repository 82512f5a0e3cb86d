"""bench/performance.py: what the page says of rows and of growth."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "performance.py"


@pytest.fixture(scope="module")
def performance():
    spec = importlib.util.spec_from_file_location("performance", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def row(item="matching", case="120,087 anchors, 8 boxes", ratio=24.0, **more):
    return {
        "item": item,
        "case": case,
        "peer": "torchvision",
        "ours_ms": 1.5,
        "peer_ms": 1.5 * ratio,
        "ratio": ratio,
        "equal": True,
        "ours_min_ms": 1.25,
        "peer_min_ms": 30.0,
    } | more


FACTS = {
    "processor": "a processor",
    "instructions": "avx2",
    "threads": 2,
    "load": 0.1,
    "versions": {"torch": "2"},
    "first_calls_s": [27.2, 0.8],
}


def page(performance, *rows, growth=()):
    return performance.page(list(rows), FACTS, list(growth))


@pytest.mark.parametrize(
    ("item", "case", "goal"),
    [
        ("matching", "120,087 anchors, 8 boxes", 30),
        ("matching", "120,087 anchors, 200 boxes", 60),
        ("nms", "5,000 boxes, 80 classes", 5),
        ("nms", "5,000 boxes, 1 class", None),
        ("step", "resnet18, 512 px, batch 2, 10 boxes, fp32", 1.3),
        ("step", "resnet18, 512 px, batch 2, 10 boxes, fp32, peak memory", 1 / 0.7),
        ("convolution", "64 to 64 channels", None),
        ("data", "8 JPEGs, 640 x 480 to 1066 x 800", None),  # beside torchvision
    ],
)
def test_goals_are_found_by_item_and_case(performance, item, case, goal):
    assert performance.goal_of(row(item, case)) == goal


def test_a_missed_goal_is_bold_and_listed(performance):
    said = page(performance, row(ratio=24.0))
    assert (
        "| 120,087 anchors, 8 boxes | torchvision | 1.5 ms (1.25 ms) | 36 ms (30 ms) | **24** | 30 | yes |"
        in said
    )
    assert "- matching, 120,087 anchors, 8 boxes: 24, goal 30" in said


def test_a_goal_that_is_met_is_neither(performance):
    said = page(performance, row(ratio=31.0))
    assert "| 31 | 30 | yes |" in said
    assert "- nowhere on this machine" in said


def test_unequal_outputs_stand_out(performance):
    assert "| **no** |" in page(performance, row(equal=False))


def test_memory_has_no_least(performance):
    memory = {"ours_mib": 500.0, "peer_mib": 900.0, "ratio": 1.8, "item": "step", "equal": None}
    memory |= {"case": "resnet18, fp32, peak memory", "peer": "torchvision", "ours_min_mib": None}
    assert "| 500 MiB | 900 MiB | 1.80 | 1.4 | - |" in page(performance, memory)


def test_loaders_are_shown_with_their_rates(performance):
    rates = {"ours_images_per_second": 200.4, "peer_images_per_second": 50.0}
    said = page(
        performance, row("data", "8 JPEGs, 640 x 480 to 1066 x 800", 4.0, peer="Pillow and NumPy", **rates)
    )
    assert "| 1.5 ms (1.25 ms), 200 images/s | 6 ms (30 ms), 50 images/s | 4.00 | 2 | yes |" in said


def test_growth_compares_time_with_work(performance):
    line = performance.Growth("class loss", "px", (256, 512, 1024), (1.0, 3.0, 10.5), power=2)
    assert line.row() == "| class loss | 512 px | 1,024 | 4.0x | 3.5x |"
    assert line.work(0) == 1 / 16
    assert line.row() in page(performance, row(), growth=[line])


def test_growth_is_drawn(performance, tmp_path):
    lines = [performance.Growth("an operation", of, (1, 10), (0.1, 1.0)) for of in ("px", "boxes", "classes")]
    performance.draw_growth(lines, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 1000
