"""Shapes are checked under pytest: every tensor function's jaxtyping annotation is enforced by beartype."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

import fresh
from kernel_cases import torch_threads
from retinanet.data import Dataset, open_dataset
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.devices import fix_matrix_products

# As for mypy, an int is welcome where a float is declared.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

# Before the first import of any of them; outside pytest the annotations cost nothing.
install_import_hook(
    [
        "retinanet.anchors",
        "retinanet.atss",
        "retinanet.batches",
        "retinanet.boxes",
        "retinanet.inference.post_processing",
        "retinanet.losses",
        "retinanet.matching",
    ],
    "conftest.check",
)
fix_matrix_products()
torch.set_num_threads(min(2, torch.get_num_threads()))

# A shell that starts us in the background ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Half a minute of one core where none of it is on disk yet.
COMPILED = """
from retinanet.bench import convolution, data, loss, matching, nms, postprocess
for contests in (loss.contests(64, 3, 2, compiled=False), matching.contests(64, (2,)), nms.contests(64, (9,)),
                 postprocess.contests(64, 3), convolution.contests(((96, 16),)), data.contests((32,), 1, (96, 64))):
    next(contests)
"""


def pytest_configure(config: pytest.Config) -> None:
    """Where every test is going to run, import and compile on another core while tests are collected."""
    if config.args_source is not pytest.Config.ArgsSource.ARGS and not config.option.collectonly:
        fresh.begin()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        compiling = subprocess.Popen([sys.executable, "-c", COMPILED], **quiet)
        config.add_cleanup(compiling.wait)
        config.add_cleanup(compiling.terminate)  # before that


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few small images, which no test changes; who needs others has a fixture of that name."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return generate_shapes(folder, train=6, val=2, spec=ShapesSpec(image_size=96))


@pytest.fixture
def train(data: Path) -> Dataset:
    return open_dataset(data, "train")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures at the end of a run, which take as long as a run of a few steps."""
    monkeypatch.setattr("retinanet.training.run.draw_run", lambda *_: None)


@pytest.fixture(params=[1, 2, 3])
def any_threads(request):
    with torch_threads(request.param):
        yield


@pytest.fixture
def small_parts(monkeypatch):
    """Let small cases, too, be shared between threads."""
    from retinanet.kernels.cpu import focal, matching, selection

    monkeypatch.setattr(focal, "LEAST_BLOCKS", 1)
    monkeypatch.setattr(matching, "LEAST_BLOCKS", 1)
    monkeypatch.setattr(matching, "LEAST_BOXES", 1)
    monkeypatch.setattr(matching, "GROUP", 1)
    monkeypatch.setattr(selection, "LEAST", 1)
