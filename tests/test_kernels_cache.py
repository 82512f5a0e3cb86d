"""Machine code is kept on disk, belongs to its sources, and no fault of a file or disk stops a call."""

import inspect
import os
import sys

import numpy as np
import pytest

pytest.importorskip("numba")

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

from fresh import run_python
from retinanet.batches import MatchState
from retinanet.kernels.cpu import selection
from retinanet.kernels.cpu.compiled import compiled


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


VALUES = np.array([3.0, 1.0, 2.0], np.float32)


def smallest():
    """A kernel as a new process has it: nothing of it is compiled or loaded yet."""
    return compiled()(selection._smallest.py_func)


def came_from_disk(kernel) -> bool:
    assert kernel(VALUES) == 1
    return sum(kernel.stats.cache_hits.values()) == 1


def test_machine_code_is_kept_on_disk(cache_folder):
    assert not came_from_disk(smallest())
    assert {file.suffix for file in cache_folder.rglob("*.*")} == {".nbi", ".nbc"}
    assert came_from_disk(smallest())


@pytest.mark.parametrize("content", [b"", b"half", b"10", b"noise"])
@pytest.mark.parametrize("kinds", [[".nbi"], [".nbc"], [".nbi", ".nbc"]])
def test_a_spoilt_file_is_replaced(kinds, content, cache_folder):
    came_from_disk(smallest())
    for file in [file for file in cache_folder.rglob("*.*") if file.suffix in kinds]:
        whole = file.read_bytes()
        spoilt = {b"half": whole[: len(whole) // 2], b"10": whole[:10], b"noise": b"\x80\x04noise" * 100}
        file.write_bytes(spoilt.get(content, content))
    assert not came_from_disk(smallest())
    assert came_from_disk(smallest())


def test_a_missing_file_is_replaced(cache_folder):
    came_from_disk(smallest())
    for file in cache_folder.rglob("*.nbc"):
        file.unlink()
    assert not came_from_disk(smallest())
    assert came_from_disk(smallest())


def test_other_sources_are_another_key(cache_folder, monkeypatch):
    came_from_disk(smallest())
    module = sys.modules[compiled.__module__]
    monkeypatch.setattr(module, "SOURCES", "0" * 64)
    assert not came_from_disk(smallest())
    assert came_from_disk(smallest())
    monkeypatch.undo()


def test_sources_are_those_of_all_kernels_and_of_the_states(monkeypatch):
    module = sys.modules[compiled.__module__]
    read = []
    read_bytes = module.Path.read_bytes
    monkeypatch.setattr(module.Path, "read_bytes", lambda file: read.append(file.name) or read_bytes(file))
    assert module._digest_of_sources() == module.SOURCES
    assert {"focal.py", "matching.py", "nms.py", "selection.py", "values.py", "compiled.py"} <= set(read)
    assert inspect.getsourcefile(MatchState).endswith(read[-1])
    monkeypatch.setattr(module.Path, "read_bytes", lambda file: b"other")
    assert module._digest_of_sources() != module.SOURCES


def raise_(error: Exception):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.usefixtures("cache_folder")
@pytest.mark.parametrize("place", [(FunctionCache, "save_overload"), (IndexDataCacheFile, "_save_data")])
def test_a_full_disk_stops_no_call(place, monkeypatch):
    monkeypatch.setattr(*place, raise_(OSError(28, "No space left on device")))
    assert not came_from_disk(smallest())
    monkeypatch.undo()


def test_a_spoilt_file_on_a_full_disk_stops_no_call(cache_folder, monkeypatch):
    came_from_disk(smallest())
    for file in cache_folder.rglob("*.nbi"):
        file.write_bytes(b"")
    monkeypatch.setattr(IndexDataCacheFile, "_save_index", raise_(OSError(28, "No space left on device")))
    assert not came_from_disk(smallest())


def test_a_failure_to_load_stops_no_call(cache_folder, monkeypatch):
    came_from_disk(smallest())
    monkeypatch.setattr(FunctionCache, "load_overload", raise_(ValueError("bytes of another kind")))
    assert not came_from_disk(smallest())


def test_without_a_place_for_files_kernels_are_compiled_all_the_same(monkeypatch):
    monkeypatch.setattr(FunctionCache, "__init__", raise_(RuntimeError("no locator available")))
    assert not came_from_disk(smallest())


def test_a_process_with_spoilt_files_in_its_cache(cache_folder):
    assert not came_from_disk(smallest())
    files = [*cache_folder.rglob("*.nbi"), *cache_folder.rglob("*.nbc")]
    assert len(files) == 2
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    script = """
import numpy as np
from retinanet.kernels.cpu.selection import _smallest
print(_smallest(np.array([3, 1, 2], np.float32)))
"""
    assert run_python(script, NUMBA_CACHE_DIR=str(cache_folder)).stdout == "1.0\n"
    assert came_from_disk(smallest())  # from what the other process has left


COMPILE_TWO = """
import numpy as np
from retinanet.kernels.cpu import selection
from retinanet.kernels.cpu.compiled import compiled
for dtype in (np.float32, np.int32):
    selection._smallest(np.array([3, 1, 2], dtype))
"""


def test_one_line_says_that_kernels_are_compiled(cache_folder):
    (line,) = run_python(COMPILE_TWO, NUMBA_CACHE_DIR=str(cache_folder)).stderr.splitlines()
    assert line.startswith(
        f"compiling the fast paths for this machine, up to half a minute, once; kept in {cache_folder}"
    )
    assert run_python(COMPILE_TWO, NUMBA_CACHE_DIR=str(cache_folder)).stderr == ""


@pytest.mark.slow
def test_one_line_says_that_nothing_can_be_kept():
    no_place = "from numba.core.caching import CacheImpl; CacheImpl._locator_classes = []"
    for _ in range(2):
        (line,) = run_python(no_place + COMPILE_TWO).stderr.splitlines()
        assert "in every process" in line
        assert "NUMBA_CACHE_DIR names a folder" in line
