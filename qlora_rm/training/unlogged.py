"""Sums of a run since its last log line: saved with each checkpoint, and restored by a resumed run."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from qlora_rm.errors import UserError

FILE_NAME = "progress.json"


@dataclass
class Progress:
    """State since the last log line at a checkpoint; transformers saves only what has been logged.

    Attributes:
        losses: sum of the loss since the last log line, one for each process.
        logged_at: the step of that line.
        metrics: TRL's running metrics since then.
        tokens: number of tokens trained on so far.
        evaluation_due: this step's evaluation has not been done.
        total_loss: sum of the loss of all steps up to that line, averaged over processes; None: saved by an earlier
            version.
        total_since: the step after which that sum begins.
    """

    losses: list[float]
    logged_at: int
    metrics: dict[str, list[float]]
    tokens: int
    evaluation_due: bool
    total_loss: float | None = None
    total_since: int = 0

    def save(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the progress saved in `folder`.

        Raises:
            UserError: the file cannot be read, or does not hold a progress.
        """
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name: content[field.name] for field in fields(cls) if field.name in content}
            progress = cls(**known)
            progress.losses = [float(loss) for loss in progress.losses]
            progress.metrics = {name: [float(v) for v in values] for name, values in progress.metrics.items()}
            return progress
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({error}). Go on from another checkpoint.") from error
