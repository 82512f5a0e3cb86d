"""Hostile files: memory stays bounded, nothing takes for ever, nothing is written into the data folder."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz_readers
from retinanet.data import open_dataset, read_coco, read_voc
from retinanet.data.auditing import audit_images, unlisted_images
from retinanet.errors import DataError

MEMORY = 3 * 2**30  # address space of a child, its libraries included
OPEN = """
import resource, sys, time
from retinanet.data import read_coco, read_voc
from retinanet.errors import DataError
started = time.process_time()
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
try:
    if sys.argv[1].endswith(".json"):
        found = read_coco(sys.argv[1], split="train", images="absent")
    else:
        found = read_voc(sys.argv[1], split="train")
    print("data set of", len(found), "images,", found.fault_total, "faults")
except DataError as error:
    print("DataError", error)
print(time.process_time() - started)
"""

IMAGES = (
    b'{"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "a"}], "annotations": '
)


def opened_in_a_child(path: Path, memory: int = MEMORY) -> tuple[str, float]:
    """Open in a process of bounded memory; return what it said and how many seconds it worked."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(path), str(memory)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said, _, seconds = done.stdout.rstrip().rpartition("\n")
    return said, float(seconds)


def xml_folder(folder: Path, content: Callable[[Path], Any]) -> Path:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("a\n")
    content(folder / "Annotations/a.xml")
    return folder


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    with path.open("wb") as stream:
        stream.write(start)
        stream.truncate(size)


def bomb(path: Path) -> None:
    entities = "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10 if i else 'lol'}'>" for i in range(12))
    path.write_text(f"<?xml version='1.0'?><!DOCTYPE a [{entities}]><annotation>&a11;</annotation>")


@pytest.mark.skipif(sys.platform != "linux", reason="bounds the memory of a process as Linux does")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda path: sparse(path, 200 * 2**20, b"<annotation>"),
            "needs at most 8,388,608 bytes; got 209,715,200",
        ),
        (bomb, "needs plain XML without DOCTYPE and ENTITY"),
    ],
    ids=["200 MB", "entity bomb"],
)
def test_hostile_xml(tmp_path: Path, make: Callable[[Path], Any], said: str) -> None:
    out, seconds = opened_in_a_child(xml_folder(tmp_path / "data", make), 2**30)
    assert out.startswith("DataError")
    assert said in out
    assert seconds < 5


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.skipif(sys.platform != "linux", reason="bounds the memory of a process as Linux does")
@pytest.mark.parametrize(
    ("make", "said", "memory"),
    [
        (lambda path: sparse(path, 6 * 2**30, b"\n" * 9), "it begins with", 2**30),
        (lambda path: sparse(path, 2**40, b"{"), "needs at most 8,589,934,592 bytes", 2**30),
        (lambda path: sparse(path, 6 * 2**30, b'{"images"'), "needs more memory than there is", 2**30),
        (lambda path: sparse(path, 2**30, b"\xff\xfe{\0"), "needs at most 67,108,864 bytes", 2**30),
        (lambda path: path.write_bytes(IMAGES + DEEP + b"}"), "nested too deeply", 2**30),
        (
            lambda path: path.write_bytes(IMAGES + b"[" + b"1," * 300_000 + b"1]}"),
            "1 images, 300002 faults",
            MEMORY,
        ),
        (
            lambda path: path.write_bytes(IMAGES + b"[" + b"{}," * 300_000 + b"{}]}"),
            "300002 faults",
            MEMORY,
        ),
        (
            lambda path: path.write_bytes(IMAGES + b"[" + b'"' + b"x" * 20_000_000 + b'"]}'),
            "1 images, 2 faults",
            2**30,
        ),
        (
            lambda path: path.write_bytes(IMAGES + b'[{"id": ' + b"9" * 1_000_000 + b"}]}"),
            "Exceeds the limit",
            2**30,
        ),
    ],
    ids=["zeros", "a terabyte", "more than there is", "wide", "deep", "numbers", "objects", "text", "digits"],
)
def test_hostile_json(tmp_path: Path, make: Callable[[Path], Any], said: str, memory: int) -> None:
    path = tmp_path / "x.json"
    make(path)
    out, seconds = opened_in_a_child(path, memory)
    assert said in out
    assert len(out) < 2000
    assert seconds < 5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="bounds the memory of a process as Linux does")
@pytest.mark.parametrize(("section", "entry"), [("images", b"1"), ("annotations", b"{}")])
def test_ten_million_entries_take_bounded_memory(tmp_path: Path, section: str, entry: bytes) -> None:
    many = b"[" + (entry + b",") * 10_000_000 + entry + b"]"
    parts = {
        "images": b'[{"id": 1}]',
        "annotations": b"[]",
        "categories": b'[{"id": 1, "name": "a"}]',
        section: many,
    }
    content = b",".join(b'"%b": %b' % (key.encode(), value) for key, value in parts.items())
    (tmp_path / "x.json").write_bytes(b"{" + content + b"}")
    out, _ = opened_in_a_child(tmp_path / "x.json")
    assert "10000001 records" in out or "10000001 faults" in out or "10000002 faults" in out


# ---------------------------------------------------------------------------------------------------------
# Nothing is written

_watched: list[str] = []
_written: list[str] = []
_WRITES = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "os.chmod",
}


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or not (event == "open" or event in _WRITES):
        return
    path = str(arguments[0])
    writes = event != "open" or bool(
        (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    )
    if writes and path.startswith(_watched[0]):
        _written.append(f"{event} {path}")


sys.addaudithook(_watch)  # for good, but silent while nothing is watched


@contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    """Fail where anything in the folder is opened to be written, and where a listing of it changes."""
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}
    _written.clear()
    _watched.append(str(folder))
    try:
        yield
    finally:
        _watched.clear()
    assert _written == []
    assert {
        path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]
    } == before


def test_the_watch_sees_what_is_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), nothing_written(tmp_path):
        (tmp_path / "x").write_text("y")
    with pytest.raises(AssertionError), nothing_written(tmp_path):
        (tmp_path / "x").unlink()


@pytest.mark.parametrize("name", sorted(fuzz_readers.seeds()))
def test_nothing_is_written_into_a_data_set_that_is_read(tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    for path, content in fuzz_readers.seeds()[name].items():
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        (data / path).write_bytes(content)
    for path in sorted(data.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    data.chmod(0o555)
    try:
        with nothing_written(data):
            try:
                dataset = open_dataset(data, "train")
            except DataError:  # a real annotation file without its images
                dataset = open_dataset(data, "train", images="absent")
            audit_images(dataset, cache=tmp_path / "cache")
            unlisted_images([dataset])
    finally:
        for path in [data, *data.rglob("*")]:
            path.chmod(0o755)


# ---------------------------------------------------------------------------------------------------------
# Anything at all

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "name", "bbox", "x"]), inner)
    ),
    max_leaves=12,
)
ids = st.sampled_from([0, 1, 2, "1", "x", 1.0, None, True]) | json_values
sections = st.fixed_dictionaries(
    {
        "images": st.lists(
            st.fixed_dictionaries(
                {"id": ids},
                optional={
                    "file_name": st.just("a.png") | json_values,
                    "width": ids,
                    "height": st.integers(0, 50),
                },
            )
            | json_values,
            max_size=3,
        ),
        "annotations": st.lists(
            st.fixed_dictionaries(
                {
                    "image_id": ids,
                    "category_id": ids,
                    "bbox": st.lists(st.floats(), min_size=4, max_size=4) | json_values,
                },
                optional={"id": ids, "area": json_values, "iscrowd": json_values},
            ),
            max_size=4,
        ),
        "categories": st.lists(st.fixed_dictionaries({"id": ids, "name": st.text(max_size=2)}), max_size=3),
    }
)


@settings(max_examples=100, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=sections | json_values, images=st.sampled_from(["required", "absent"]))
def test_any_json_ends_in_a_data_set_or_a_data_error(tmp_path: Path, document: Any, images: Any) -> None:
    path = tmp_path / "x.json"
    (tmp_path / "a.png").write_bytes(b"no image")
    path.write_text(json.dumps(document).replace("NaN", "1e999").replace("Infinity", "1e999"))
    assert len(fuzz_readers.refusal(lambda: read_coco(path, split="train", images=images))) < 4000


texts = st.text(st.sampled_from("<>/&;'\"=! abxyminax019.-\n"), max_size=30)
elements = st.recursive(
    texts,
    lambda inner: st.tuples(
        st.sampled_from(
            ["object", "bndbox", "xmin", "ymin", "xmax", "ymax", "name", "size", "width", "height", "part"]
        ),
        st.lists(inner, max_size=5),
    ).map(lambda pair: f"<{pair[0]}>{''.join(pair[1])}</{pair[0]}>"),
    max_leaves=15,
)


@settings(max_examples=80, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=elements, images=st.sampled_from(["required", "absent"]))
def test_any_xml_ends_in_a_data_set_or_a_data_error(tmp_path: Path, body: str, images: Any) -> None:
    if not (tmp_path / "Annotations").exists():
        xml_folder(tmp_path, lambda path: None)
        (tmp_path / "JPEGImages/a.png").write_bytes(b"no image")
    (tmp_path / "Annotations/a.xml").write_text(f"<annotation>{body}</annotation>")
    assert len(fuzz_readers.refusal(lambda: read_voc(tmp_path, split="train", images=images))) < 4000


@pytest.mark.parametrize(
    ("seconds", "usual_seed"), [(3.0, "0"), pytest.param(60.0, "1", marks=pytest.mark.slow)]
)
def test_damaged_files_of_every_format_end_in_a_data_set_or_a_data_error(
    seconds: float, usual_seed: str
) -> None:
    seed = int(os.environ.get("FUZZ_SEED", usual_seed))
    count = 0
    for number, wrong in fuzz_readers.failures(seconds, seed):
        count += 1
        assert wrong is None, f"python tests/fuzz_readers.py --seed {seed} --only {number}\n{wrong}"
    assert count > 20
