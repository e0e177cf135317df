"""Recover the day of training for models of earlier versions whose chat template reads the clock.

The manifest now records the date and the saved template reads no clock, so that this module has nothing to do.
"""

from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_rm.artifacts.golden import GoldenItem
from qlora_rm.artifacts.manifest import FILE_NAME, Manifest, has_trained_template
from qlora_rm.console import say
from qlora_rm.errors import UserError
from qlora_rm.preferences.clock import Template, fixed, fixed_date, now, reads_clock, rendering_at
from qlora_rm.preferences.text_as import kind_of_row

DAYS_BACK = 1500
"""How many days back the day of training is searched."""


def fix_to_training(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Fix a template that reads the clock to the day when the golden items of `folder` were rendered; warn once.

    If that day is not found, the template stays as it is and the checks of the golden items fail.
    """
    template = tokenizer.chat_template
    if not reads_clock(template) or not (Path(folder) / FILE_NAME).exists():
        return
    try:
        manifest = Manifest.load(folder)
    except UserError:  # callers that need the manifest report that
        return
    if not has_trained_template(tokenizer, manifest.contract):  # it must not be rendered; loading it reports that
        return
    golden = manifest.golden
    items = [item for item in golden if kind_of_row(item.candidates()) == "turns"]
    found = (_day_of(item, template, tokenizer) for item in sorted(items, key=_length))
    when = next(filter(None, found), None)
    reads = f"warning: the chat template in {folder} reads the clock, and its manifest, of an earlier version, records no date"
    if when is None:
        _say_once(
            f"{reads}: it renders today's, and scores may differ from training's. Train again to have it recorded."
        )
        return
    tokenizer.chat_template = fixed(template, when)
    _say_once(f"{reads}: its golden items were rendered on {fixed_date(tokenizer.chat_template)}, which is taken.")


@cache
def _say_once(line: str) -> None:
    say(line)


def _length(item: GoldenItem) -> int:
    return sum(map(len, item.token_ids))


def _day_of(item: GoldenItem, template: Template, tokenizer: PreTrainedTokenizerBase) -> datetime | None:
    """The latest day on which the template's rendering of `item` becomes its token ids.

    None if there is no such day, or if the rendering does not depend on the day. Tomorrow is tried too: training may
    have run in another time zone.
    """
    text = tokenizer.get_chat_template(tools=item.tools)
    render, today = rendering_at(text), now().replace(hour=0, minute=0, second=0)
    variables = {**tokenizer.special_tokens_map, "tools": item.tools, **item.template_kwargs}
    days = [today - timedelta(days=back) for back in range(-1, DAYS_BACK)]
    try:
        written = [render(day, messages=[*item.prompt, *item.responses[0]], **variables) for day in days]
    except Exception:  # a template is a program
        return None
    if len(set(written[:8])) == 1:
        return None
    ids = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in written)
    return next((day for day, found in zip(days, ids, strict=True) if found == item.token_ids[0]), None)
