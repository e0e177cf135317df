"""Checkpoints on disk: how a complete one is recognized, and when older ones are deleted.

A checkpoint is complete when its `COMPLETE` file exists and agrees with the other files (`wholeness.py`). Renaming a
finished folder would prove the same, but several processes and libraries write to its final name, and DeepSpeed stores
that name inside. A file list also detects a folder that a copy or a removal left incomplete.

Only real folders that this project wrote are removed: never a link, its target, or a file.
"""

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qlora_rm.console import WARNING, say
from qlora_rm.errors import UserError, first_line
from qlora_rm.training.wholeness import OWN, UNFINISHED, WHOLE, fault, is_empty, read_mark, write_mark


def checkpoint_folder(output_dir: str, step: int) -> Path:
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def step_of(folder: Path) -> int | None:
    """Return the step of a folder named like a checkpoint, else None."""
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(0|[1-9][0-9]*)", folder.name)
    return int(match[1]) if match else None


def checkpoints(output_dir: str) -> list[Path]:
    """Return all paths named like a checkpoint, complete or not, including files and links, earliest step first."""
    steps = {step_of(path): path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return [steps[step] for step in sorted(step for step in steps if step is not None)]


def is_real(folder: Path) -> bool:
    """Whether this is a real folder, not a link to one."""
    return folder.is_dir() and not folder.is_symlink()


def is_own(folder: Path) -> bool:
    """Whether this project wrote the folder, or it is empty; it may then be removed when its step is saved again."""
    return is_real(folder) and (
        is_empty(folder) or any((folder / name).is_file() for name in (*OWN, WHOLE, UNFINISHED))
    )


def is_cut_off(folder: Path) -> bool:
    """Whether this project was killed while saving or removing the folder."""
    return is_real(folder) and (
        is_empty(folder) or ((folder / UNFINISHED).is_file() and not os.path.lexists(folder / WHOLE))
    )


def half_written(output_dir: str) -> list[Path]:
    """Return checkpoint folders whose save or removal was interrupted; no run resumes from them."""
    return [path for path in checkpoints(output_dir) if is_cut_off(path)]


def flush(folder: Path, *, below: bool = True) -> None:
    """Flush the files in `folder`, and with `below` those in its subfolders, to the disk."""
    for path in [folder, *(folder.rglob("*") if below else _files(folder, below=False))]:
        _sync(path)


def begin(folder: Path) -> None:
    """Create the folder of a checkpoint that is about to be written, and mark it as unfinished."""
    folder.mkdir(parents=True)
    (folder / UNFINISHED).touch()
    _sync(folder)


def mark_whole(folder: Path, *, changed: bool = True) -> None:
    """Mark the flushed contents of `folder` as a complete checkpoint.

    Arguments:
        changed: compute every sha256; otherwise only those of files that `COMPLETE` does not list.
    """
    beside = write_mark(folder, None if changed else read_mark(folder))
    _sync(beside)
    beside.replace(folder / WHOLE)
    (folder / UNFINISHED).unlink(missing_ok=True)
    _sync(folder)
    _sync(folder.parent)


def is_whole(folder: Path) -> bool:
    """Whether `folder` is complete and every file has its recorded size; only a resume compares contents."""
    return fault(folder) is None


def size_of(folder: Path) -> int | None:
    """Return the bytes of a complete checkpoint; None if it is not complete."""
    return sum(entry.bytes for entry in read_mark(folder).values()) if is_whole(folder) else None


def discard(folder: Path, *, foreign: bool = False) -> None:
    """Remove a checkpoint. An interrupted removal leaves a folder that is empty or marked `INCOMPLETE`.

    Arguments:
        foreign: remove it even if another program wrote it.

    Raises:
        UserError: it is a file, a link, or a folder that this project did not write.
    """
    if not os.path.lexists(folder):
        return
    if not (is_real(folder) if foreign else is_own(folder)):
        raise UserError(in_the_way(folder))
    mark, unfinished = folder / WHOLE, folder / UNFINISHED
    if mark.is_file():
        mark.replace(unfinished)
    elif not is_empty(folder):
        with suppress(OSError):  # the disk may be full; the removal frees space
            unfinished.touch()
    _sync(folder)
    for path in folder.iterdir():
        if path != unfinished:
            shutil.rmtree(path) if is_real(path) else path.unlink()
    unfinished.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:  # on NFS a file that another process has open stays under another name
        unfinished.touch()
        raise


def discard_if_possible(folder: Path) -> None:
    """Remove a checkpoint whose place is not needed yet; report a failure, and leave it to the next save."""
    try:
        discard(folder)
    except OSError as error:
        say(f"{WARNING}{folder} could not be removed ({error.strerror}); the next save tries again")


def in_the_way(folder: Path) -> str:
    """Return the message for a path that has the name of a checkpoint to be saved and is not this project's."""
    kind = "a link" if folder.is_symlink() else "a folder that qlora-rm did not write" if folder.is_dir() else "a file"
    return (
        f"{folder} is {kind}, and the checkpoint of that step needs its name. Move it, or choose another --output_dir."
    )


def require_free_names(output_dir: str, after: int, until: int, *, foreign: bool = False) -> None:
    """Refuse paths that must not be removed and have the name of a checkpoint that steps `after` to `until` may save.

    Raises:
        UserError: such a path is a file, a link, or (unless `foreign`) a folder that this project did not write.
    """
    for path in checkpoints(output_dir):
        if after < (step_of(path) or 0) <= until and not (is_real(path) if foreign else is_own(path)):
            raise UserError(in_the_way(path))


def prune(
    output_dir: str, limit: int | None, best: str | None, upto: int, spared: Collection[Path] = frozenset()
) -> None:
    """Keep the `limit` latest complete checkpoints and the `best`; remove other complete ones and interrupted ones.

    Call this only after a new checkpoint is complete. A path that is damaged, later than step `upto`, in `spared`, or
    not a real folder of this project is kept and not counted.
    """
    known = [path for path in checkpoints(output_dir) if (step_of(path) or 0) <= upto and path not in spared]
    whole = [path for path in known if is_own(path) and is_whole(path)]
    kept = set(whole[-limit:] if limit and limit > 0 else whole)
    kept |= {path for path in whole if best is not None and path.name == Path(best).name}
    for path in [*whole, *half_written(output_dir)]:
        if path not in kept:
            discard_if_possible(path)


def last_whole(output_dir: str) -> Path | None:
    """Return the latest complete checkpoint, or None."""
    return next((path for path in reversed(checkpoints(output_dir)) if is_whole(path)), None)


@contextmanager
def written_whole(folder: Path, output_dir: Path, *, removed: bool) -> Iterator[None]:
    """Turn a failed write into `folder` inside the block into a message with a remedy.

    Arguments:
        output_dir: the folder of the run's checkpoints, `folder` itself or one above it.
        removed: remove the half-written folder.

    Raises:
        UserError: a write failed, most often because the disk is full.
    """
    try:
        yield
    except Exception as error:
        why = _write_error(error)
        told = None if why is None else no_room(folder, output_dir, None, why)
        if removed:
            with suppress(
                OSError, UserError
            ):  # another process may still be writing there; without `COMPLETE` the folder does not count
                discard(folder)
        if told is None:
            raise
        raise told from error


def lacks_room(folder: Path) -> int | None:
    """Return the size of the last complete checkpoint if that many bytes are not free for `folder`; else None."""
    known = last_whole(str(folder.parent))
    needed = size_of(known) if known else None
    return needed if needed is not None and needed > shutil.disk_usage(folder.parent).free else None


def no_room(folder: Path, output_dir: Path, needed: int | None, why: str) -> UserError:
    """Return the error for a folder that cannot be written.

    Arguments:
        output_dir: the folder of the run's checkpoints.
        needed: bytes it takes; None if unknown.
    """
    free = shutil.disk_usage(output_dir).free
    known = last_whole(str(output_dir))
    needed = needed or (size_of(known) if known else None)
    needs = f"; a checkpoint takes about {_megabytes(needed)}" if needed else ""
    stands = f"The last complete checkpoint is {known}." if known else "There is no complete checkpoint yet."
    return UserError(
        f"{folder} could not be written: {why}. {_megabytes(free)} are free there{needs}. {stands} Make room, or lower "
        "--save_total_limit, and go on by --resume auto."
    )


def _write_error(error: Exception) -> str | None:
    """Return why a file could not be written; None if `error` has another cause.

    torch and safetensors do not write through Python, and raise their own exceptions.
    """
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
