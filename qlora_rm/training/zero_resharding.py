"""Conversion of a DeepSpeed checkpoint of N processes for M processes, through DeepSpeed's universal form."""

import contextlib
import io
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint import ds_to_universal

from qlora_rm.console import say
from qlora_rm.errors import UserError
from qlora_rm.training.checkpoints import flush, is_real, mark_whole, written_whole
from qlora_rm.training.resume_terms import Terms
from qlora_rm.training.safe_loading import reading
from qlora_rm.training.wholeness import read_mark

LATEST = "latest_universal"
"""The file from which DeepSpeed reads the universal folder's name. A conversion counts once `COMPLETE` lists it."""


def take_share(checkpoint: Path, accelerator: Any, engine: DeepSpeedEngine | None = None) -> None:
    """Make an engine read `checkpoint` in the form that fits this number of processes.

    deepspeed 0.19 takes the form from its configuration at every checkpoint it reads, so call this before each one.

    Arguments:
        engine: the one that will read it; None if accelerate has not built it yet.
    """
    universal = _universal_if_others(checkpoint, accelerator)
    if engine is not None:
        engine._config.load_universal_checkpoint = universal
    else:
        accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": universal}


def _universal_if_others(checkpoint: Path, accelerator: Any) -> bool:
    """Whether a different number of processes wrote `checkpoint`; if so, it is converted."""
    processes, writers = accelerator.num_processes, Terms.load(checkpoint).world_size
    tag_of(checkpoint)
    if processes == writers:
        return False
    if accelerator.is_main_process:
        say(f"converting {checkpoint} of {writers} processes for {processes}")
        convert(checkpoint)
    accelerator.wait_for_everyone()
    return True


def convert(checkpoint: Path) -> None:
    """Write the universal form of `checkpoint` into its folder, unless it is there; it is deleted with the checkpoint.

    It holds each trained weight unsharded, with its moments, so that any number of processes can take their shares.

    Raises:
        UserError: it could not be written.
    """
    if LATEST in read_mark(checkpoint):
        return
    if not is_real(checkpoint):
        raise UserError(
            f"{checkpoint} is a link, and another number of processes needs a converted copy of it. Copy the folder, then go on "
            "from the copy."
        )
    tag = tag_of(checkpoint)
    name, beside = f"{tag}_universal", checkpoint / ".universal"
    (checkpoint / LATEST).unlink(missing_ok=True)
    for stale in (beside, checkpoint / name):
        shutil.rmtree(stale, ignore_errors=True)
    with written_whole(checkpoint, checkpoint.parent, removed=False), reading(checkpoint):
        beside.mkdir()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(_arguments(checkpoint / tag, beside / name))
        flush(beside)
        (beside / name).replace(checkpoint / name)
        (beside / LATEST).replace(checkpoint / LATEST)
        shutil.rmtree(beside)
        flush(checkpoint)
        mark_whole(checkpoint, changed=False)


def tag_of(checkpoint: Path) -> str:
    """Return the name of DeepSpeed's folder inside `checkpoint`, as the file `latest` gives it.

    Raises:
        UserError: the file cannot be read, or names another place.
    """
    try:
        tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / 'latest'} cannot be read: {error}. Go on from another checkpoint.") from error
    if not re.fullmatch(r"global_step[0-9]+", tag) or not is_real(checkpoint / tag):
        raise UserError(
            f"{checkpoint / 'latest'} names {tag!r:.60}, which is no folder of DeepSpeed in this checkpoint."
        )
    return tag


def _arguments(source: Path, target: Path) -> Namespace:
    """Return the converter's arguments.

    One process is enough for the trained weights, and forking next to a process group is not safe. ZeRO-1 and 2 save no
    `universal_checkpoint_info`; for one tensor-parallel rank its default is right.
    """
    return Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
