"""What a run leaves for people: curves, pictures and a page."""

from __future__ import annotations

from retinanet.data import Dataset
from retinanet.inference import Validation
from retinanet.report.curves import draw_curves
from retinanet.report.page import write_page
from retinanet.training.folder import RunFolder
from retinanet.training.pictures import draw_validation
from retinanet.training.planning import Plan


def report_run(plan: Plan, best: Validation, val_set: Dataset, folder: RunFolder) -> None:
    """Draw and write the report of a run into its folder."""
    curves, pictures = folder.path / "curves.png", folder.path / "pictures.png"
    draw_curves(folder.history(), curves)
    draw_validation(val_set, best, pictures)
    write_page(
        folder.path / "report.html",
        title=f"RetinaNet run {folder.path.name}",
        lead=f"{plan.spec.backbone.name}, {plan.steps:,} steps of {plan.batch_size} images, data {val_set.name}; "
        "figures and pictures are of the best model on the split val.",
        metrics=best.metrics.to_json(),
        pictures=[("Curves", curves), ("Ground truth and detections", pictures)],
        settings={setting: f"{value} ({why})" for setting, value, why in plan.reasons},
    )
