"""Choice of the checkpoint that a run resumes from, with a report on those that are not usable."""

from pathlib import Path
from typing import NamedTuple

from qlora_rm.console import WARNING, is_main_process, say
from qlora_rm.errors import UserError
from qlora_rm.training.checkpoints import checkpoints, is_cut_off, step_of
from qlora_rm.training.ranks import exchange, stop_together
from qlora_rm.training.wholeness import fault, notes_sizes_only

RESTART = "restart"


class Choice(NamedTuple):
    """Where a run begins.

    Attributes:
        folder: the checkpoint to resume from; None: begin at step 0.
        unusable: checkpoints found but not used. They do not count as the run's; only a save of the same step replaces
            one.
    """

    folder: Path | None
    unusable: frozenset[Path] = frozenset()


def is_restart(resume: str | None) -> bool:
    """Whether `--resume` asks to begin at step 0 despite checkpoints that are not usable."""
    return resume is not None and resume.lower() == RESTART


def choose(output_dir: str, resume: str | None, world_size: int = 1) -> Choice:
    """Return the checkpoint to resume from, and report those that are found but not used.

    Rank 0 compares contents with their hashes, each rank compares sizes. Collective.

    Arguments:
        resume: None (begin), "auto" (the last usable one, if any), "restart" (begin despite unusable ones), or a
            folder.

    Raises:
        UserError: the named folder is not usable, or a later one is usable; checkpoints exist but none is usable
            ("auto"); one is usable ("restart"); any checkpoint exists (None).
    """
    if resume is None:
        if checkpoints(output_dir):
            raise UserError(
                f"{output_dir} holds checkpoints of an earlier run. Go on with it by --resume auto, or choose another "
                "--output_dir."
            )
        return Choice(None)
    found = exchange(checkpoints(output_dir), world_size)[0]  # rank 0's: file systems may show ranks different lists
    if resume.lower() in ("auto", "true"):
        return _auto(output_dir, found, world_size)
    if is_restart(resume):
        return _restart(output_dir, found, world_size)
    return _named(Path(resume), output_dir, found, world_size)


def _auto(output_dir: str, found: list[Path], world_size: int) -> Choice:
    usable, reasons = _last_usable(found, world_size)
    refused = {path: reason for path, reason in reasons.items() if not is_cut_off(path) and path.is_dir()}
    if usable is None and refused:
        raise UserError(
            f"None of the checkpoints in {output_dir} can be used: {_listed(refused)}. Restore one, choose another --output_dir, "
            f"or pass --resume {RESTART} to begin at step 0; it replaces a checkpoint only when it saves the same step again."
        )
    if reasons:
        going_on = f"the run goes on from {usable}" if usable else "the run begins at step 0"
        say(f"{WARNING}not usable: {_listed(reasons)}; {going_on}")
    if usable is not None:
        _note(usable)
    return Choice(usable, frozenset(reasons))


def _restart(output_dir: str, found: list[Path], world_size: int) -> Choice:
    usable, reasons = _last_usable(found, world_size)
    if usable is not None:
        raise UserError(
            f"--resume {RESTART} begins at step 0, and {usable} is a usable checkpoint of an earlier run. Go on with it by "
            "--resume auto, choose another --output_dir, or move the checkpoints."
        )
    if found:
        say(
            f"{WARNING}the run begins at step 0. Left in {output_dir}: {_listed(reasons)}. A checkpoint is replaced when the "
            "same step is saved again."
        )
    return Choice(None, frozenset(found))


def _named(folder: Path, output_dir: str, found: list[Path], world_size: int) -> Choice:
    stop_together(None if folder.is_dir() else f"--resume {folder}: there is no such folder.", world_size)
    if reason := _agreed_fault(folder, world_size):
        last, _ = _last_usable(found, world_size)
        hint = f"The last usable one is {last}." if last else "There is no usable one."
        raise UserError(f"--resume {folder} cannot be used: {reason}. {hint}")
    later, unusable = _last_usable(
        [path for path in found if (step_of(path) or 0) > (step_of(folder) or 0)], world_size
    )
    if later is not None:
        raise UserError(
            f"--resume {folder}: {output_dir} holds a later checkpoint, {later.name}, which --resume auto would take the "
            "next time. Remove what is later, or choose another --output_dir."
        )
    _note(folder)
    return Choice(folder, frozenset(unusable))


def _last_usable(found: list[Path], world_size: int) -> tuple[Path | None, dict[Path, str]]:
    """Return the last of these folders that is complete and unchanged since its save, and why later ones are not."""
    reasons: dict[Path, str] = {}
    for path in reversed(found):
        reason = _agreed_fault(path, world_size)
        if reason is None:
            return path, reasons
        reasons[path] = reason
    return None, reasons


def _agreed_fault(folder: Path, world_size: int) -> str | None:
    """Return the first rank's `fault`; rank 0 compares contents too. Collective, with the same result on every rank."""
    everyones = exchange(fault(folder, contents=is_main_process()), world_size)
    return next((reason for reason in everyones if reason is not None), None)


def _listed(reasons: dict[Path, str]) -> str:
    return "; ".join(
        f"{path.name}: {reason}" for path, reason in sorted(reasons.items(), key=lambda item: step_of(item[0]) or 0)
    )


def _note(usable: Path) -> None:
    if notes_sizes_only(usable):
        say(f"{usable} was saved by an earlier version, which noted sizes only: its contents are not compared")
