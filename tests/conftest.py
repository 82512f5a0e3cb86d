"""Shapes are checked under pytest: every tensor function's jaxtyping annotation is enforced by beartype."""

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

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
torch.set_num_threads(min(2, torch.get_num_threads()))
