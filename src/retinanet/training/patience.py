"""Early stopping: a run that validations no longer make better may end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EarlyStop:
    """Where a run stops early.

    Args:
        step: of the validation that was one too many.
        patience: validations without a better AP.
        best_step, best_ap: of the best one, the latest where several are equal, as in `best/`.
    """

    step: int
    patience: int
    best_step: int
    best_ap: float

    def __str__(self) -> str:
        many = "1 validation" if self.patience == 1 else f"{self.patience} validations"
        return (
            f"stopped early at step {self.step:,}: no better AP for {many}; best {self.best_ap:.3f} at step "
            f"{self.best_step:,}"
        )


def early_stop(validations: Iterable[Mapping[str, Any]], patience: int | None) -> EarlyStop | None:
    """Return where a run stops early; None where it goes on.

    The run stops at the first validation that is the `patience`-th in a row without a higher AP than the best before
    it. An equal AP is no better one, and an AP that is undefined counts as 0. Nothing else is asked, so that a run that
    is resumed stops at the same step, and one that stopped early is finished.

    The schedule is not changed by it: the rate falls as for all steps of the plan. What the last, smallest steps would
    have brought, often the most, is then not known; give it time, or a smaller --epochs.

    Args:
        validations: lines of `metrics.jsonl`, oldest first, with "step" and "ap".
        patience: None never stops.
    """
    best_ap, best_step, since = -1.0, 0, 0
    for record in validations:
        ap = record["ap"] or 0.0
        since = 0 if ap > best_ap else since + 1
        if ap >= best_ap:
            best_ap, best_step = ap, record["step"]
        if patience is not None and since >= patience:
            return EarlyStop(record["step"], patience, best_step, best_ap)
    return None
