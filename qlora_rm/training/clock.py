"""The fixed date of a chat template that reads the clock: the same on all ranks and in every resumed run."""

from datetime import datetime
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from qlora_rm.artifacts.manifest import Manifest, hash_of_template
from qlora_rm.artifacts.own_tokenizer import read_tokenizer
from qlora_rm.console import say
from qlora_rm.errors import UserError
from qlora_rm.preferences.clock import CLOCK, fix_date, fixed_date, now, original, reads_clock
from qlora_rm.training.arguments import TrainingConfig


def fix_training_date(tokenizer: PreTrainedTokenizerBase, args: TrainingConfig, resume: Path | None) -> None:
    """Write the start time of training into the tokenizer's chat template, if the template reads the clock.

    Every rank must call it. A template whose date is already fixed, such as a loaded adapter's, keeps it.

    Arguments:
        resume: the checkpoint to resume from, whose date is kept.

    Raises:
        UserError: the template cannot be fixed, or the checkpoint does not record its date.
    """
    start = _of_first_rank(now(), args)
    if reads_clock(tokenizer.chat_template):
        if resume is None or not _take_from(resume, tokenizer, args):
            fix_date(tokenizer, start)
        date = fixed_date(tokenizer.chat_template)
        say(
            f"chat template: it reads the clock ({CLOCK}); it is saved with the date {date}, which every later step renders"
        )


def _take_from(resume: Path, tokenizer: PreTrainedTokenizerBase, args: TrainingConfig) -> bool:
    """Take the checkpoint's template if it is this one with a fixed date. If not, the contract check fails later."""
    contract = Manifest.load(resume).contract
    if contract.date is None and contract.chat_template_sha256 == hash_of_template(tokenizer):
        raise UserError(
            f"The checkpoint {resume} was written by an earlier version, which did not record the date that its chat "
            "template reads from the clock. Start anew in another --output_dir."
        )
    saved = read_tokenizer(str(resume), args.trust_remote_code).chat_template
    if contract.date is None or original(saved) != tokenizer.chat_template:
        return False
    tokenizer.chat_template = saved
    return True


def _of_first_rank(moment: datetime, args: TrainingConfig) -> datetime:
    """Return the first rank's time: hosts may be in different time zones, and ranks may start around midnight."""
    if args.world_size == 1:
        return moment
    everyones: list[datetime | None] = [None] * args.world_size
    torch.distributed.all_gather_object(everyones, moment)
    return everyones[0] or moment
