"""The batch of a step once more, to find out what was wrong with it."""

from __future__ import annotations

from pathlib import Path

from retinanet.batches import Batch
from retinanet.data import open_dataset
from retinanet.data.loading import training_batches
from retinanet.data.transforms import Augmentation
from retinanet.errors import ConfigError
from retinanet.folders import read_json
from retinanet.model import ModelSpec
from retinanet.plain import from_plain
from retinanet.training.folder import RunFolder
from retinanet.training.plan import training_preprocessing


def replay(file: str | Path) -> Batch:
    """Make the batch of a skipped step again, pixel by pixel: what the network saw. It needs the run's data alone, no
    device and no weights.

    Args:
        file: `RUN/skipped/STEP.json`, which a run writes when it skips a step. The images are in its order: those of
            all processes, one after the other, padded to one batch.

    Raises:
        ConfigError: it is no such file, or the data or this version would give other images. Data has changed where
            its classes, its boxes, or the names or sizes of its images have; pixels are not compared.
    """
    file = Path(file)
    run = file.absolute().parent.parent
    written = read_json(file)
    if not {"step", "images"} <= written.keys():
        raise ConfigError(f"replay needs RUN/skipped/STEP.json of a run; {file} is none")
    options = RunFolder(run).options()
    plan = read_json(run / "plan.json")
    try:
        step, images = int(written["step"]), [image["index"] for image in written["images"]]
        digest, batch_size = plan["data"]["train"], int(plan["batch_size"])
        repeat_rare = float(plan["recipe"]["repeat_rare"])
        spec = ModelSpec.from_json(plan["spec"])
        augmentation = from_plain(Augmentation, plan["augmentation"], "plan.json: augmentation")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}, or plan.json of its run, is damaged: {error!r}") from None
    train = open_dataset(
        options.data,
        "train",
        image_root=options.image_root,
        box_format=options.box_format,
        strict=options.strict,
    )
    if train.digest() != digest:
        raise ConfigError(f"replay needs the data that the run had; {options.data} has changed since {file}")
    (batch,) = training_batches(
        train,
        training_preprocessing(spec, options),
        augmentation,
        batch_size=batch_size,
        seed=options.seed,
        steps=step,
        first_step=step - 1,
        repeat_rare=repeat_rare,
    )
    if list(batch.indices) != images:
        raise ConfigError(
            f"replay needs the version of retinanet that wrote {file}, and images that can be read as they could then; "
            "it would give others"
        )
    return batch
