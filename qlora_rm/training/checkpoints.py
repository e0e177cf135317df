"""Checkpoints on disk: written to the end or not at all, which one to go on from, and when older ones may go.

A checkpoint is whole when its `COMPLETE` file is there and every file it lists has the size it lists. The file is
written last, after everything else has reached the disk, and taken away first. Writing under another name and
renaming would say the same; but several processes and libraries write into the folder by its final name, DeepSpeed
keeps that name inside, and a list also tells a folder that a copy, or a removal, left half there.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qlora_rm.errors import UserError, first_line

WHOLE = "COMPLETE"
"""Name of the file written last into a checkpoint: the sizes of all others, as JSON."""


def checkpoint_folder(output_dir: str, step: int) -> Path:
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def step_of(folder: Path) -> int | None:
    """The step of a folder named like a checkpoint, else None."""
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
    return int(match[1]) if match else None


def checkpoints(output_dir: str) -> list[Path]:
    """All checkpoint folders, whole or not, earliest step first."""
    steps = {step_of(path): path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return [steps[step] for step in sorted(step for step in steps if step is not None)]


def half_written(output_dir: str) -> list[Path]:
    """Checkpoint folders that were cut off while they were saved or removed: nothing goes on from them."""
    return [path for path in checkpoints(output_dir) if not is_whole(path)]


def flush(folder: Path, *, below: bool = True) -> None:
    """Return once the files in `folder`, and in the folders below it, are on the disk and not only on their way there."""
    for path in [folder, *(folder.rglob("*") if below else _files(folder, below=False))]:
        _sync(path)


def mark_whole(folder: Path) -> None:
    """Declare what stands in `folder`, flushed before, a whole checkpoint."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    beside = folder / f".{WHOLE}"
    beside.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    _sync(beside)
    beside.replace(folder / WHOLE)
    _sync(folder)
    _sync(folder.parent)


def is_whole(folder: Path) -> bool:
    """Whether `folder` was written to its end and has lost nothing since."""
    return size_of(folder) is not None


def size_of(folder: Path) -> int | None:
    """Bytes of a whole checkpoint; None where it is not whole."""
    try:
        sizes = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
    except (OSError, ValueError):
        return None
    return sum(sizes.values())


def discard(folder: Path) -> None:
    """Remove a checkpoint, its mark first: cut off in the middle, it leaves nothing that passes for whole."""
    if not folder.exists():
        return
    (folder / WHOLE).unlink(missing_ok=True)
    _sync(folder)
    shutil.rmtree(folder)


def prune(output_dir: str, limit: int | None, best: str | None) -> None:
    """Keep the `limit` latest whole checkpoints and the `best`; remove the others, and what never became whole.

    To be called when a new checkpoint has become whole, and not before.
    """
    whole = [path for path in checkpoints(output_dir) if is_whole(path)]
    kept = set(whole[-limit:] if limit and limit > 0 else whole)
    kept |= {path for path in whole if best is not None and path.name == Path(best).name}
    for path in checkpoints(output_dir):
        if path not in kept:
            discard(path)


def last_whole(output_dir: str) -> Path | None:
    """The latest checkpoint that was written to its end, or None."""
    return next((path for path in reversed(checkpoints(output_dir)) if is_whole(path)), None)


def resume_point(output_dir: str, resume: str | None) -> Path | None:
    """The checkpoint to go on from: `resume` is None (start anew), "auto" (the last whole one, if any) or a folder.

    Raises:
        UserError: the folder named is no whole checkpoint, later ones stand beside it, or a run is about to start anew
            over another's checkpoints.
    """
    if resume is None:
        if checkpoints(output_dir):
            raise UserError(
                f"{output_dir} holds checkpoints of an earlier run. Go on with it by --resume auto, or choose another "
                "--output_dir."
            )
        return None
    if resume.lower() in ("auto", "true"):
        return last_whole(output_dir)
    folder = Path(resume)
    if not folder.is_dir():
        raise UserError(f"--resume {resume}: there is no such folder.")
    known = last_whole(output_dir)
    if not is_whole(folder):
        hint = f"The last whole one is {known}." if known else "There is no whole one."
        raise UserError(
            f"--resume {resume} was cut off while it was saved: its {WHOLE} file is not there, or lists more. {hint}"
        )
    if known is not None and (step_of(known) or 0) > (step_of(folder) or 0):
        raise UserError(
            f"--resume {resume}: {output_dir} holds a later checkpoint, {known.name}, which --resume auto would take the "
            "next time. Remove what is later, or choose another --output_dir."
        )
    return folder


@contextmanager
def written_whole(folder: Path, *, removed: bool) -> Iterator[None]:
    """Around everything that is written into `folder`: what cannot be written ends in a message with the way out.

    Arguments:
        removed: take the half-written folder away again.

    Raises:
        UserError: a write failed, most often because the disk is full.
    """
    try:
        yield
    except Exception as error:
        why = _write_error(error)
        told = None if why is None else no_room(folder, None, why)
        if removed:
            with suppress(
                OSError
            ):  # another process may still be writing there; without its mark it counts for nothing
                discard(folder)
        if told is None:
            raise
        raise told from error


def lacks_room(folder: Path) -> int | None:
    """Bytes that a new checkpoint `folder` will take, by the last whole one, where fewer are free; else None."""
    known = last_whole(str(folder.parent))
    needed = size_of(known) if known else None
    return needed if needed is not None and needed > shutil.disk_usage(folder.parent).free else None


def no_room(folder: Path, needed: int | None, why: str) -> UserError:
    """The message for a folder that cannot be written.

    Arguments:
        needed: bytes it takes; None where that is not known.
    """
    free = shutil.disk_usage(folder.parent).free
    known = last_whole(str(folder.parent))
    needed = needed or (size_of(known) if known else None)
    needs = f"; a checkpoint takes about {_megabytes(needed)}" if needed else ""
    stands = f"The last whole checkpoint is {known}." if known else "No checkpoint is whole yet."
    return UserError(
        f"{folder} could not be written: {why}. {_megabytes(free)} are free there{needs}. {stands} Make room, or lower "
        "--save_total_limit, and go on by --resume auto."
    )


def _write_error(error: Exception) -> str | None:
    """Why a file could not be written; None where `error` says something else. torch and safetensors, which write
    without Python, have their own kinds of error."""
    if isinstance(error, OSError):
        known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
        return error.strerror if error.errno in known else None
    if isinstance(error, SafetensorError):
        return first_line(error)
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "inline_container" in str(error)):
        return "torch could not write all of a file"
    return None


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _files(folder: Path, *, below: bool = True) -> list[Path]:
    return sorted(path for path in folder.glob("**/*" if below else "*") if path.is_file())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
