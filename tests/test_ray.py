"""The recipe for Ray Train of docs/training.md, on one machine, where Ray is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import two_processes
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.training.state import newest_state

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_ray_starts_two_processes_that_train_as_one(tmp_path: Path) -> None:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    data = generate_shapes(tmp_path / "shapes", train=6, val=2, spec=ShapesSpec(image_size=96))
    options = {**two_processes.TINY, "data": str(data), "output": str(tmp_path / "run")}

    def work(options: dict[str, object]) -> None:
        import retinanet

        retinanet.train(**options)

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
    )
    try:
        TorchTrainer(work, train_loop_config=options, scaling_config=ScalingConfig(num_workers=2)).fit()
    finally:
        ray.shutdown()
    state, damaged = newest_state(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert (state.step, damaged) == (two_processes.TINY["steps"], [])
    assert "processes" in (tmp_path / "run" / "plan.json").read_text()
