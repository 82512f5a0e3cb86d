"""Shapes are checked under pytest: every tensor function's jaxtyping annotation is enforced by beartype."""

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

from kernel_cases import torch_threads
from retinanet.devices import fix_matrix_products

# As for mypy, an int is welcome where a float is declared.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

# Before the first import of any of them; outside pytest the annotations cost nothing.
install_import_hook(
    [
        "retinanet.anchors",
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
