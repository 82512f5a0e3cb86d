"""The batch of a step once more, to find out what was wrong with it."""

from __future__ import annotations

from pathlib import Path

from retinanet.batches import Batch
from retinanet.data.loading import training_batches
from retinanet.errors import ConfigError
from retinanet.folders import read_json
from retinanet.training.configuration import TrainingOptions, read_config
from retinanet.training.planning import plan_run
from retinanet.training.preparation import open_splits


def replay(file: str | Path) -> Batch:
    """Make the batch of a skipped step again, pixel by pixel, in the process at hand: what the network saw.

    Args:
        file: `RUN/skipped/STEP.json`, which a run writes when it skips a step. The images are in its order.

    Raises:
        ConfigError: it is no such file, or the data or this version would give other images.
    """
    file = Path(file)
    run = file.absolute().parent.parent
    written = read_json(file)
    if not {"step", "images"} <= written.keys():
        raise ConfigError(f"replay needs RUN/skipped/STEP.json of a run; {file} is none")
    options = TrainingOptions(**{"data": "", **read_config(run / "config.yaml")})
    train, _ = open_splits(
        options.data, image_root=options.image_root, box_format=options.box_format, strict=options.strict
    )
    plan = plan_run(options, train).as_begun(read_json(run / "plan.json"))
    (batch,) = training_batches(
        train,
        plan.preprocessing,
        plan.augmentation,
        batch_size=plan.batch_size,
        seed=options.seed,
        steps=written["step"],
        first_step=written["step"] - 1,
        repeat_rare=plan.recipe.repeat_rare,
    )
    if list(batch.indices) != [image["index"] for image in written["images"]]:
        raise ConfigError(f"replay needs the data that the run had; {options.data} has changed since {file}")
    return batch
