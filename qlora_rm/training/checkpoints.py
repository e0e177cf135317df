"""Checkpoints: which are whole, which one to go on from."""

import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qlora_rm.errors import UserError

WHOLE = "COMPLETE"
"""Name of the empty file written last into a checkpoint; a checkpoint without it was cut off in the middle."""


def checkpoint_folder(output_dir: str, step: int) -> Path:
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def mark_whole(folder: Path) -> None:
    (folder / WHOLE).touch()


def unmark(folder: Path) -> None:
    """A folder about to be written again is not whole, whatever an earlier run left in it."""
    (folder / WHOLE).unlink(missing_ok=True)


def checkpoints(output_dir: str) -> list[Path]:
    """All checkpoint folders, whole or not, earliest step first."""
    steps = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name):
            steps[int(match[1])] = path
    return [steps[step] for step in sorted(steps)]


def last_whole(output_dir: str) -> Path | None:
    """The latest checkpoint that was written to its end, or None."""
    return next((path for path in reversed(checkpoints(output_dir)) if (path / WHOLE).exists()), None)


def resume_point(output_dir: str, resume: str | None) -> Path | None:
    """The checkpoint to go on from: `resume` is None (start anew), "auto" (the last whole one, if any) or a folder.

    Raises:
        UserError: the folder named is no whole checkpoint, or a run is about to start anew over another's checkpoints.
    """
    if resume is None:
        if checkpoints(output_dir):
            raise UserError(
                f"{output_dir} holds checkpoints of an earlier run. Go on with it by --resume_from_checkpoint auto, "
                "or choose another --output_dir."
            )
        return None
    if resume.lower() in ("auto", "true"):
        return last_whole(output_dir)
    folder = Path(resume)
    if not folder.is_dir():
        raise UserError(f"--resume_from_checkpoint {resume}: there is no such folder.")
    if not (folder / WHOLE).exists():
        known = last_whole(output_dir)
        hint = f"The last whole one is {known}." if known else "There is no whole one."
        raise UserError(
            f"--resume_from_checkpoint {resume} was cut off while it was saved: it holds no {WHOLE} file. {hint}"
        )
    return folder
