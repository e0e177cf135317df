"""The date that a run gives to a chat template which reads the clock: one for all ranks, and for every resumption."""

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
    """Write the moment at which training started into the tokenizer's template, where that reads the clock.

    Every rank must call it. A template whose date is fixed already, that of an adapter which is trained on, keeps it.

    Arguments:
        resume: the checkpoint the run goes on from, whose date is taken.

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
    """Take the checkpoint's template, where it is this one with a date; otherwise the contracts will differ."""
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
    """The first rank's: hosts may stand in several time zones, and ranks start on both sides of midnight."""
    if args.world_size == 1:
        return moment
    everyones: list[datetime | None] = [None] * args.world_size
    torch.distributed.all_gather_object(everyones, moment)
    return everyones[0] or moment
