"""Auditing: every image is really decoded, what it is and what contradicts its annotations is named."""

import hashlib
import os
import pickle
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retinanet.data import auditing, facts_cache, isolation
from retinanet.data import near_duplicates as near_duplicates_module
from retinanet.data.auditing import (
    ImageFacts,
    NearPair,
    audit_images,
    difference_hash,
    label_frames,
    near_duplicates,
    unlisted_images,
)
from retinanet.data.dataset import Annotation, Dataset
from retinanet.data.facts_cache import FILE_NAME, FactsCache
from retinanet.data.kinds import Kind
from retinanet.data.near_duplicates import equal_files
from retinanet.errors import ConfigError
from retinanet.records import Classes


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A picture with large features, which survives scaling."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def turned(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def dataset_of(root: Path, **sizes: tuple[int, int]) -> Dataset:
    """A data set of the named files (`a_png` is a.png) with their annotated sizes."""
    files = [name.replace("_", ".") for name in sizes]
    return Dataset.build(
        name="x",
        split="train",
        root=root,
        classes=Classes(("cell",)),
        files=files,
        image_ids=files,
        sizes=list(sizes.values()),
        annotations=[Annotation(0, (1, 1, 5, 5), 0, 16, 0, 1)],
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def audit(dataset: Dataset, tmp_path: Path, **options: Any) -> tuple[list[ImageFacts | None], list[Any]]:
    return audit_images(dataset, cache=tmp_path / "cache", **options)


def test_facts_are_those_of_the_file(data: Path, tmp_path: Path) -> None:
    noise().save(data / "a.png")
    noise(40, 30).save(data / "b.jpg", exif=turned(6))
    facts, faults = audit(dataset_of(data, a_png=(40, 30), b_jpg=(30, 40)), tmp_path)
    assert faults == []
    a, b = facts
    assert a is not None
    assert b is not None
    assert (a.index, a.width, a.height, a.orientation, a.mode, a.frames) == (0, 40, 30, 1, "RGB", 1)
    assert (b.index, b.width, b.height, b.orientation) == (1, 30, 40, 6)
    assert b.stored_size == (40, 30)
    assert a.digest == hashlib.sha256((data / "a.png").read_bytes()).hexdigest()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_of_an_image_is_named(data: Path, tmp_path: Path, workers: int) -> None:
    noise().save(data / "good.png")
    noise().save(data / "cut.jpg")
    whole = (data / "cut.jpg").read_bytes()
    (data / "cut.jpg").write_bytes(whole[: whole.index(b"\xff\xda") + 100])  # Image.verify() would take it
    (data / "text.png").write_text("no image")
    noise(20, 15).save(data / "half.png")
    noise(31, 77).save(data / "other.png")
    noise().save(data / "turned.jpg", exif=turned(6))
    frames = [noise(seed=i) for i in range(3)]
    frames[0].save(data / "film.gif", save_all=True, append_images=frames[1:])
    names = ("good_png", "gone_png", "cut_jpg", "text_png", "half_png", "other_png", "turned_jpg", "film_gif")
    done: list[int] = []
    dataset = dataset_of(data, **dict.fromkeys(names, (40, 30)))
    facts, faults = audit(dataset, tmp_path, workers=workers, progress=done.append)
    assert [fact is None for fact in facts] == [False, True, True, True, False, False, False, False]
    assert done == list(range(9))
    assert [(fault.file, fault.kind, fault.action) for fault in faults] == [
        ("gone.png", "missing image", "dropped"),
        ("cut.jpg", "truncated image", "dropped"),
        ("text.png", "unreadable image", "dropped"),
        ("half.png", "other size", "dropped"),
        ("other.png", "other size", "dropped"),
        ("turned.jpg", "rotated labels", "dropped"),
        ("film.gif", "animated image", "repaired"),
    ]
    said = [fault.reason for fault in faults]
    assert said[3] == "is annotated as 40 x 30 pixels, but is 20 x 15 pixels: scaled by 0.5"
    assert said[4] == "is annotated as 40 x 30 pixels, but is 31 x 77 pixels"
    assert "people see 30 x 40 pixels (EXIF orientation 6)" in said[5]
    assert said[6] == "holds 3 pictures; the first is used"
    assert all(fault.fix for fault in faults)


def test_16_bits_that_hold_12_are_named(data: Path, tmp_path: Path) -> None:
    for name, brightest in (("dark", 4095), ("bright", 4096)):
        values = np.linspace(0, brightest, 40 * 30).astype(np.uint16).reshape(30, 40)
        Image.fromarray(values).save(data / f"{name}.png")
    Image.new("L", (40, 30), 3).save(data / "black.png")  # with 8 bits it may be night
    for _ in range(2):  # decoded, then from the cache
        facts, faults = audit(
            dataset_of(data, dark_png=(40, 30), bright_png=(40, 30), black_png=(40, 30)), tmp_path
        )
        assert [fact.brightest for fact in facts if fact] == [15, 16, 3]
        assert [(fault.file, fault.kind, fault.action) for fault in faults] == [
            ("dark.png", "dark image", "repaired")
        ]
        assert (
            faults[0].reason == "has 16 bits a pixel and no value above 4095; as it stands it is nearly black"
        )


def test_a_bomb_is_named(data: Path, tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(data / "a.png")
    _, faults = audit(dataset_of(data, a_png=(10_000, 10_000)), tmp_path)
    assert [fault.kind for fault in faults] == [Kind.HUGE_IMAGE]


def die_of_b(path: str) -> str:
    if path == "b":
        os._exit(11)
    return path.upper()


def dead(path: str) -> str:
    return f"{path} crashed"


def test_a_crash_costs_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "CHUNK", 1)
    monkeypatch.setattr(isolation, "AHEAD", 2)  # c is under way when b ends the process
    found = list(isolation.each(die_of_b, dict(enumerate("abc")), 1, crashed=dead))
    assert found == [(0, "A"), (1, "b crashed"), (2, "C")]


def note_and_die_of_b(path: str) -> str:
    folder, _, name = path.rpartition("/")
    with (Path(folder) / "log").open("a") as log:
        log.write(name)
    if name == "b":
        while "d" not in (Path(folder) / "log").read_text():  # the other worker is done with its chunk
            time.sleep(0.01)
        time.sleep(0.3)
        os._exit(11)
    return name.upper()


def test_what_is_done_when_a_worker_crashes_is_not_done_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(isolation, "CHUNK", 2)
    items = {number: f"{tmp_path}/{name}" for number, name in enumerate("abcdef")}
    found = [result for _, result in isolation.each(note_and_die_of_b, items, 2, crashed=dead)]
    assert found == ["A", f"{tmp_path}/b crashed", *"CDEF"]
    log = (tmp_path / "log").read_text()
    assert (log.count("c"), log.count("d")) == (1, 1)
    assert log.count("b") == 3  # with the others, with its chunk, alone


SCRIPT = """
import os, sys, time
from retinanet.data.isolation import each

def slow(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    os.rename(path, path + ".pid")
    time.sleep(60)

{guard}
    list(each(slow, {{i: f"{folder}/{{i}}" for i in range(32)}}, 2, crashed=repr))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who lives")
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard='if __name__ == "__main__":', folder=tmp_path))
    parent = subprocess.Popen([sys.executable, str(script)])
    files = [tmp_path / "0.pid", tmp_path / "16.pid"]
    wait_until(lambda: all(file.exists() for file in files))
    workers = [int(file.read_text()) for file in files]
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(is_alive(worker) for worker in workers))


def test_a_script_without_a_guard_is_told_about_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard="if True:", folder=tmp_path))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("retinanet.errors.ConfigError: worker processes end before they begin")
    assert 'if __name__ == "__main__":' in last
    assert not list(tmp_path.glob("*.pid"))


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_what_was_found_is_kept_until_the_file_changes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        noise().save(data / f"{name}.png")
    dataset = dataset_of(data, a_png=(40, 30), b_png=(40, 30))
    first, _ = audit(dataset, tmp_path)
    decoded: list[str] = []
    examine = auditing.examine
    monkeypatch.setattr(auditing, "examine", lambda path: decoded.append(path) or examine(path))
    again, faults = audit(dataset, tmp_path)
    assert (again, faults, decoded) == (first, [], [])
    noise(20, 15).save(data / "a.png")
    changed, faults = audit(dataset, tmp_path)
    assert decoded == [str(data / "a.png")]
    assert changed[0] is not None
    assert (changed[0].width, faults[0].kind) == (20, "other size")
    decoded.clear()
    (tmp_path / "cache" / FILE_NAME).write_bytes(b"not a database, and long enough to be looked at" * 100)
    assert audit(dataset, tmp_path)[0] == changed
    assert len(decoded) == 2
    assert audit(dataset, tmp_path)[0] == changed
    assert len(decoded) == 2


def test_a_cache_that_cannot_be_made_is_none(data: Path, tmp_path: Path) -> None:
    noise().save(data / "a.png")
    (tmp_path / "cache").write_text("a file in its place")
    facts, faults = audit(dataset_of(data, a_png=(40, 30)), tmp_path)
    assert facts[0] is not None
    assert faults == []


def test_the_cache_never_lies_in_the_data_folder(data: Path, tmp_path: Path) -> None:
    noise().save(data / "a.png")
    (tmp_path / "link").symlink_to(data)
    for place in (data, data / "cache", tmp_path / "link" / "cache"):
        with pytest.raises(ConfigError, match="the cache needs a folder outside the data set"):
            audit_images(dataset_of(data, a_png=(40, 30)), cache=place)
    assert os.listdir(data) == ["a.png"]


def test_the_cache_lies_where_all_that_can_be_made_again_lies(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "mine"))
    noise().save(data / "a.png")
    audit_images(dataset_of(data, a_png=(40, 30)))
    assert (tmp_path / "mine" / "facts" / FILE_NAME).is_file()
    with pytest.raises(
        ConfigError, match="RETINANET_CACHE names another"
    ):  # images elsewhere than the labels
        audit_images(dataset_of(data, a_png=(40, 30)), data=tmp_path)


ROW = (40, 30, 1, "RGB", 1, 255, "digest", 7)


def kept(folder: Path, paths: list[str]) -> list[bool]:
    with FactsCache(folder, outside=()) as cache:
        return [cache.get(path) == ROW for path in paths]


def test_two_checks_do_not_wait_for_each_other(data: Path, tmp_path: Path) -> None:
    paths = [str(data / name) for name in ("a", "b")]
    for path in paths:
        Path(path).write_text("")
    start = time.perf_counter()
    with FactsCache(tmp_path, outside=()) as first, FactsCache(tmp_path, outside=()) as second:
        for cache, path in ((first, paths[0]), (second, paths[1])):
            cache.get(path)
            cache.put(path, ROW)
    assert kept(tmp_path, paths) == [True, True]
    assert time.perf_counter() - start < 2


def test_a_cache_that_another_program_holds_is_given_up(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts_cache, "PATIENCE", 0.05)
    monkeypatch.setattr(facts_cache, "WRITE_EVERY", 0.0)
    paths = [str(data / str(number)) for number in range(40)]
    for path in paths:
        Path(path).write_text("")
    with FactsCache(tmp_path, outside=()) as cache:
        held = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
        held.execute("BEGIN EXCLUSIVE")
        start = time.perf_counter()
        for path in paths:
            assert cache.get(path) is None
            cache.put(path, ROW)
        assert time.perf_counter() - start < 1  # it waited once
        held.close()
    assert not any(kept(tmp_path, paths))


def test_a_row_that_is_no_number_is_none(data: Path, tmp_path: Path) -> None:
    (data / "a").write_text("")
    with FactsCache(tmp_path, outside=()) as cache:
        cache.get(str(data / "a"))
        cache.put(str(data / "a"), ROW)
    table = sqlite3.connect(tmp_path / FILE_NAME)
    table.execute("UPDATE images SET dhash = 'no number'")
    table.commit()
    table.close()
    assert kept(tmp_path, [str(data / "a")]) == [False]


# ---------------------------------------------------------------------------------------------------------
# Which frame the labels follow, and what is not listed


@pytest.mark.parametrize(
    ("orientation", "annotated", "frame", "kinds"),
    [
        (6, (30, 40), "seen", []),
        (6, (40, 30), "stored", ["rotated labels"]),
        (3, (40, 30), "either", []),  # turned by half: the size cannot tell
        (8, (41, 30), "neither", ["other size"]),
    ],
)
@pytest.mark.parametrize("form", ["jpg", "png", "tif"])
def test_the_annotated_size_tells_which_frame_labels_follow(
    data: Path,
    tmp_path: Path,
    form: str,
    orientation: int,
    annotated: tuple[int, int],
    frame: str,
    kinds: list[str],
) -> None:
    noise().save(data / f"a.{form}", exif=turned(orientation))
    noise().save(data / "upright.png")
    dataset = dataset_of(data, **{f"a_{form}": annotated, "upright_png": (40, 30)})
    facts, faults = audit(dataset, tmp_path)
    assert label_frames(dataset, facts) == {
        **dict.fromkeys(("seen", "stored", "either", "neither"), 0),
        frame: 1,
    }
    assert [fault.kind for fault in faults] == kinds


def test_images_that_no_split_lists_are_named(data: Path) -> None:
    for name in ("a.png", "b.png", "c.PNG", "sub/d.jpg", "other/e.png"):
        (data / name).parent.mkdir(exist_ok=True)
        noise().save(data / name)
    (data / "notes.txt").write_text("")
    (data / "folder.png").mkdir()
    train, val = dataset_of(data, a_png=(40, 30)), dataset_of(data, b_png=(40, 30))
    assert [fault.file for fault in unlisted_images([train])] == ["b.png", "c.PNG"]
    named = unlisted_images([train, val])
    assert [(fault.file, fault.kind, fault.action) for fault in named] == [
        ("c.PNG", "unlisted image", "dropped")
    ]


def test_images_that_were_left_out_are_not_named_again(data: Path) -> None:
    noise().save(data / "b.png")
    noise().save(data / "sub.png")
    dataset = replace(dataset_of(data, a_png=(40, 30)), left_out=("b.png", "elsewhere/x.png"))
    assert "b.png" not in [fault.file for fault in unlisted_images([dataset])]
    assert "sub.png" in [fault.file for fault in unlisted_images([dataset])]


def test_names_that_are_no_text_can_be_shown(data: Path) -> None:
    (data / os.fsdecode(b"\xff.png")).write_bytes(b"")
    named = [fault.file for fault in unlisted_images([dataset_of(data, a_png=(40, 30))])]
    assert r"'\udcff.png'" in named
    "".join(named).encode()


def test_other_data_sets_in_the_cache_are_none_of_this_one(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise().save(data / "b.png")
    monkeypatch.setenv("RETINANET_CACHE", str(data.parent))
    assert unlisted_images([dataset_of(data, a_png=(40, 30))])
    (data.parent / "images").symlink_to(data)
    assert unlisted_images([dataset_of(data.parent / "images", a_png=(40, 30))]) == []


# ---------------------------------------------------------------------------------------------------------
# Near-duplicates


def test_the_difference_hash_says_where_it_gets_brighter() -> None:
    rising = np.repeat(np.arange(0, 90, 10, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    assert difference_hash(rising) == 2**64 - 1
    assert difference_hash(rising[:, ::-1].copy()) == 0
    one = np.zeros((8, 9, 3), np.uint8)
    one[0, 1] = 255  # brighter than its left neighbour, the right one is darker
    assert difference_hash(one) == 2**63
    one[0, 1], one[7, 8] = 0, 255
    assert difference_hash(one) == 1


def fact(index: int, dhash: int, digest: str = "") -> ImageFacts:
    return ImageFacts(index, 40, 30, 1, "RGB", 1, 255, digest or f"{index}-{dhash}", dhash)


BITS = 0x0F0F_3333_5555_1177


@pytest.mark.parametrize(
    ("a", "b", "pairs"),
    [
        ([fact(5, BITS)], [fact(7, BITS)], [NearPair(5, 7, False, 0)]),
        ([fact(5, BITS)], [fact(7, BITS ^ 0b1111)], [NearPair(5, 7, False, 4)]),
        ([fact(5, BITS)], [fact(7, BITS ^ 0b11111)], []),
        # the nearest, of equals the first
        ([fact(0, BITS ^ 1), fact(1, BITS), fact(2, BITS)], [fact(0, BITS)], [NearPair(1, 0, False, 0)]),
        # the same bytes, whatever the hash
        ([fact(0, 0, "same")], [fact(3, 0, "same")], [NearPair(0, 3, True, 0)]),
        # flat pictures look alike and are not
        ([fact(0, 0)], [fact(3, 0)], []),
        ([fact(0, 2**64 - 1)], [fact(3, 2**64 - 1)], []),
        ([None, fact(1, BITS)], [None, fact(3, BITS), None], [NearPair(1, 3, False, 0)]),
        ([None], [fact(3, BITS)], []),
        ([], [], []),
    ],
)
def test_near_duplicates(a: list[Any], b: list[Any], pairs: list[NearPair]) -> None:
    assert near_duplicates(a, b) == pairs


def test_equal_files_within_one_split_are_each_named_once() -> None:
    facts = [fact(0, BITS), fact(1, ~BITS % 2**64), fact(2, BITS ^ 1), fact(3, 0, "x"), fact(4, 0, "x")]
    assert equal_files([*facts, None, fact(6, 1, "x")]) == [(3, 4), (3, 6)]


def test_near_duplicates_are_those_of_a_plain_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    monkeypatch.setattr(near_duplicates_module, "BLOCK", (7, 11))
    near = [int(i) for i in random.integers(0, 2**63, 40, dtype=np.uint64)]
    facts_a, facts_b = (
        [fact(i, near[random.integers(40)] ^ (1 << int(random.integers(64)))) for i in range(50)]
        for _ in range(2)
    )
    expected = []
    for other in facts_b:
        bits, index = min(((one.dhash ^ other.dhash).bit_count(), one.index) for one in facts_a)
        expected += [NearPair(index, other.index, False, bits)] if bits <= 2 else []
    assert near_duplicates(facts_a, facts_b, distance=2) == expected
    assert len(expected) > 10


def test_a_resaved_picture_is_near_and_another_is_not(data: Path, tmp_path: Path) -> None:
    noise(400, 300, seed=1).save(data / "a.png")
    noise(400, 300, seed=2).save(data / "b.png")
    noise(400, 300, seed=1).resize((200, 150)).save(data / "c.jpg", quality=60)
    facts, _ = audit(dataset_of(data, a_png=(400, 300), b_png=(400, 300)), tmp_path)
    other, _ = audit(dataset_of(data, c_jpg=(200, 150)), tmp_path)
    (pair,) = near_duplicates(facts, other)
    assert (pair.a, pair.b, pair.equal) == (0, 0, False)


def test_a_hundred_thousand_images_are_compared_in_seconds() -> None:
    random = np.random.default_rng(0)
    hashes = [int(i) for i in random.integers(0, 2**63, 24_000, dtype=np.uint64)]
    facts = [fact(i, bits) for i, bits in enumerate(hashes)]
    start = time.perf_counter()
    near_duplicates(facts[:20_000], facts[20_000:])  # a twentieth of the pairs of 80,000 and 20,000
    assert time.perf_counter() - start < 3


def test_kinds_are_words_and_travel() -> None:
    assert Kind.REVERSED_BOX == "reversed box"
    assert f"{Kind.REVERSED_BOX}" == "reversed box"
    assert pickle.loads(pickle.dumps(Kind.OTHER_SIZE)) is Kind.OTHER_SIZE
    assert all(kind.fix for kind in Kind)
    assert Kind("duplicate box").fix.startswith("Remove")
