"""Checks that stop a run at the first loss, gradient or score that is not finite, before anything is saved or deleted.

Such a run does not recover, and each later checkpoint would replace a sound one. All checks use values that are the
same on every rank, so that all ranks stop in the same step. On a GPU they read numbers only where the trainer waits for
the device anyway.
"""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qlora_rm.errors import UserError
from qlora_rm.training.checkpoints import last_whole
from qlora_rm.training.ranks import exchange

NAMED_ROWS = 8
OVERFLOWS = 30
"""Steps in a row that fp16 may skip while it finds its loss scale: 30 halvings take 65,536 below 1e-4."""
REMEDY = "Look at these rows (weights, margins), lower --learning_rate, or train in bf16 or fp32; then go on with --resume auto."


class FiniteWatch:
    """Checks the numbers of each optimizer step.

    Arguments:
        output_dir: folder of the checkpoints.
        fp16: whether the loss is scaled, and steps whose scaled gradient overflows are skipped.

    Attributes:
        evaluated_at: the step of the last evaluation.
    """

    def __init__(self, output_dir: str, *, fp16: bool = False):
        self.output_dir, self.fp16 = output_dir, fp16
        self.evaluated_at: int | None = None
        self._micro_batches: list[tuple[Tensor, list[str]]] = []
        self._complete = False
        self._norm: tuple[Any, int] | None = None
        self._overflows = 0

    def note(self, losses: Tensor, origins: list[str]) -> None:
        """Keep the losses of a micro-batch, [B], and the file and row of each of its comparisons."""
        if self._complete:
            self._micro_batches.clear()
        self._complete = False
        self._micro_batches.append((losses, origins))

    def require_step(self, sums: Tensor, step: int) -> None:
        """Stop unless the sums of a step's micro-batches, gathered over the ranks, are finite. Every rank must call it.

        Raises:
            UserError: with the step and the rows whose loss is not finite.
        """
        self._complete = True
        self.require_norm()
        if not bool(sums.isfinite().all()):
            self._stop(f"The loss of step {step:,} is not finite", self._rows(only_faulty=True))

    def note_norm(self, norm: Any, step: int) -> None:
        """Keep the gradient norm, a number or a tensor that may not be computed yet, until `require_norm` reads it."""
        self._norm = (norm, step)
        if self.fp16:
            self.require_norm()

    def require_norm(self) -> None:
        """Stop unless the last step's gradient was finite; every rank has the same norm.

        Raises:
            UserError: with the step and its rows.
        """
        norm, step = self._norm or (None, 0)
        self._norm = None
        if norm is None or math.isfinite(float(norm)):
            self._overflows = self._overflows if norm is None else 0
            return
        self._overflows += 1
        if not self.fp16 or self._overflows > OVERFLOWS:
            self._stop(f"The gradient of step {step:,} is not finite", self._rows(only_faulty=False))

    def require_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Stop unless an evaluation's figures are finite.

        Raises:
            UserError: with the step and the figure.
        """
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                self._stop(f"{name} after step {step:,} is {value}: the weights give no finite scores", None)
        self.evaluated_at = step

    def require_weights(self, fine: bool, step: int) -> None:
        """Stop unless the weights after a step give finite scores on all ranks (`fine`).

        Raises:
            UserError: with the step.
        """
        if not fine:
            self._stop(f"The weights after step {step:,} give no finite scores", self._rows(only_faulty=False))

    def _stop(self, what: str, rows: str | None) -> NoReturn:
        known = last_whole(self.output_dir)
        kept = f"The last usable checkpoint is {known}." if known else "No checkpoint was saved."
        held = f" ({rows})" if rows else ""
        raise UserError(f"{what}{held}, so the run stops and saves nothing more. {kept} {REMEDY}")

    def _rows(self, *, only_faulty: bool) -> str | None:
        """Return the rows of the current or just finished step, of all ranks, by file and row. Collective."""
        mine = [
            origin
            for losses, origins in self._micro_batches
            for loss, origin in zip(losses.tolist(), origins, strict=False)
            if origin and not (only_faulty and math.isfinite(loss))
        ]
        world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rows = sorted({origin for of_rank in exchange(mine, world_size) for origin in of_rank}, key=_by_number)
        if not rows:
            return None
        more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
        return f"rows: {'; '.join(rows[:NAMED_ROWS])}{more}"


def _by_number(origin: str) -> tuple[str, int]:
    file, _, number = origin.rpartition(" ")
    return file, int(number) if number.isdecimal() else 0


def weights_are_finite(model: nn.Module) -> bool:
    """Whether all trained weights that this rank holds are finite."""
    found = [p.detach().isfinite().all() for p in model.parameters() if p.requires_grad and p.numel()]
    return bool(torch.stack(found).all()) if found else True


def require_finite_scores(scores: list[float], step: int) -> None:
    """Stop before scores that are not finite enter a manifest.

    Raises:
        UserError: one of them is not finite.
    """
    bad = sum(not math.isfinite(score) for score in scores)
    if bad:
        raise UserError(
            f"{bad} of the {len(scores)} golden scores after step {step:,} are not finite, so the model is not saved. {REMEDY}"
        )
