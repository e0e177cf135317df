"""The output folder of a run: separate from its inputs, writable, locked, and cleared of leftovers of killed runs."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_rm.artifacts.manifest import FILE_NAME as MANIFEST
from qlora_rm.backbone.paths import is_local
from qlora_rm.errors import UserError
from qlora_rm.training.arguments import Options
from qlora_rm.training.output_lock import OutputLock
from qlora_rm.training.ranks import stop_together

LOG = "train.log"
"""Name of the file that receives a run's output once standard output or error cannot be written."""
LEFTOVER = re.compile(rf"\.preflight-[0-9a-f]{{32}}|{re.escape(MANIFEST)}\.[0-9]+")
"""Files that a run removes itself unless it is killed."""


def require_apart(options: Options) -> None:
    """Refuse an output folder that is, or is inside, a folder that the run reads its model from.

    Raises:
        UserError: naming both options.
    """
    output = Path(str(options.training.output_dir)).expanduser().resolve()
    backbone = options.backbone
    for name, given in (
        ("model_name_or_path", backbone.model_name_or_path),
        ("adapter", options.adapter.adapter),
        ("tokenizer_name_or_path", backbone.tokenizer_name_or_path),
    ):
        if given is None or not is_local(str(given)):
            continue
        read = Path(str(given)).expanduser().resolve()
        if read == output or read in output.parents:
            where = "is" if read == output else "is inside"
            raise UserError(
                f"--output_dir {options.training.output_dir} {where} the folder of --{name} {given}, which training must not change. "
                "Choose another --output_dir."
            )


@contextmanager
def prepare(options: Options) -> Iterator[OutputLock]:
    """Create and lock the output folder, and hold the lock inside the block.

    Every rank must call it; all continue, or all stop.

    Raises:
        UserError: the folder cannot be created or written to, or another run trains there.
    """
    args = options.training
    folder = Path(str(args.output_dir))
    _require_writable(folder)
    lock, problem = OutputLock(folder), None
    try:
        if args.should_save:
            try:
                lock.take()
                _remove_leftovers(folder)
            except UserError as error:
                problem = str(error)
        stop_together(problem, args.world_size)
        yield lock
    finally:
        lock.release()


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder} is not writable.")


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            with suppress(OSError):
                path.unlink()
