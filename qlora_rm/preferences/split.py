"""Which comparisons are held out, and how often each is trained on: functions of content, never of order or seed."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from qlora_rm.preferences.comparison import Candidates
from qlora_rm.preferences.hh import hh_turns, is_hh_text
from qlora_rm.preferences.prefixes import shared_length

Digest = bytes


def digest(*parts: bytes) -> Digest:
    """A stable hash: the same on every machine, rank and run."""
    return hashlib.sha256(b"\0".join(parts)).digest()


def prompt_key(candidates: Candidates) -> Digest:
    """A hash of what is asked, the same whether it is asked as text, as raw HH text or as turns.

    Where the row has no prompt of its own, the beginning that its responses share stands for it, cut back to whole
    words; where they share none, the first response.
    """
    prompt: Any = candidates.prompt or _shared_beginning(candidates.responses) or candidates.responses[0]
    if isinstance(prompt, str):
        prompt = hh_turns(prompt) if is_hh_text(prompt) else [{"role": "user", "content": prompt}]
        if not prompt[-1]["content"]:  # the bare `Assistant:` at the end of a raw HH prompt
            prompt = prompt[:-1]
    words = json.dumps([_canonical(item) for item in prompt], ensure_ascii=False)
    return digest(words.encode(errors="surrogatepass"))  # a role may hold half a surrogate pair that no template writes


def _canonical(item: Any) -> Any:
    if isinstance(item, int):
        return item
    said = item.get("content")
    return [item["role"], said.strip() if isinstance(said, str) else json.dumps(said, sort_keys=True, default=str)]


def _shared_beginning(responses: Sequence[Any]) -> Any:
    """What all responses begin with: text cut back to whole words, or token ids; turns are split when they are read."""
    if isinstance(responses[0], list) and not isinstance(responses[0][0], int):
        return []
    shared = responses[0][: shared_length(responses)]
    if not isinstance(shared, str):
        return shared
    before, space, _ = shared.rpartition(" ")
    return (before if space else shared).strip()


def hold_out(keys: Sequence[Digest], fraction: float) -> list[bool]:
    """For each comparison, whether its prompt is held out: the ceil(fraction * n) lowest of the n distinct keys are."""
    distinct = sorted(set(keys))
    held = set(distinct[: math.ceil(fraction * len(distinct))])
    return [key in held for key in keys]


def lowest(indices: Sequence[int], order: Sequence[Digest], count: int) -> list[int]:
    """`count` of `indices`, those with the lowest hash in `order`, as they stood."""
    kept = set(sorted(indices, key=lambda index: (order[index], index))[:count])
    return [index for index in indices if index in kept]


def repeat(indices: Sequence[int], weight: float, order: Sequence[Digest]) -> list[int]:
    """Each index floor(weight) times, and once more for the fraction of them with the lowest hash in `order`."""
    whole, part = divmod(weight, 1)
    return [*indices] * int(whole) + lowest(indices, order, round(part * len(indices)))
