"""Selection of held-out and repeated comparisons, which depends on content only, never on order or seed."""

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
    """Return a stable hash: the same on every machine, rank and run."""
    return hashlib.sha256(b"\0".join(parts)).digest()


def prompt_key(candidates: Candidates) -> Digest:
    """Return a hash of the prompt, the same for text, raw HH text and turns.

    If the row has no separate prompt, the hash is of the prefix that its responses share, cut back to complete words;
    if they share none, of the first response.
    """
    prompt: Any = candidates.prompt or _shared_beginning(candidates.responses) or candidates.responses[0]
    if isinstance(prompt, str):
        prompt = hh_turns(prompt) if is_hh_text(prompt) else [{"role": "user", "content": prompt}]
        if not prompt[-1]["content"]:  # the bare `Assistant:` at the end of a raw HH prompt
            prompt = prompt[:-1]
    words = json.dumps([_canonical(item) for item in prompt], ensure_ascii=False)
    return digest(words.encode(errors="surrogatepass"))  # a role that no template writes may hold a lone surrogate


def _canonical(item: Any) -> Any:
    if isinstance(item, int):
        return item
    said = item.get("content")
    return [item["role"], said.strip() if isinstance(said, str) else json.dumps(said, sort_keys=True, default=str)]


def _shared_beginning(responses: Sequence[Any]) -> Any:
    """Return the shared prefix: text cut back to complete words, or token ids; [] for turns, already split."""
    if isinstance(responses[0], list) and not isinstance(responses[0][0], int):
        return []
    shared = responses[0][: shared_length(responses)]
    if not isinstance(shared, str):
        return shared
    before, space, _ = shared.rpartition(" ")
    return (before if space else shared).strip()


def hold_out(keys: Sequence[Digest], fraction: float) -> list[bool]:
    """Return whether each prompt is held out, which the ceil(fraction * n) lowest of the n distinct keys are."""
    distinct = sorted(set(keys))
    held = set(distinct[: math.ceil(fraction * len(distinct))])
    return [key in held for key in keys]


def lowest(indices: Sequence[int], order: Sequence[Digest], count: int) -> list[int]:
    """Return the `count` members of `indices` with the lowest hashes in `order`, in their original order."""
    kept = set(sorted(indices, key=lambda index: (order[index], index))[:count])
    return [index for index in indices if index in kept]


def repeat(indices: Sequence[int], weight: float, order: Sequence[Digest]) -> list[int]:
    """Return each index floor(weight) times, and the fractional share with the lowest hashes in `order` once more."""
    whole, part = divmod(weight, 1)
    return [*indices] * int(whole) + lowest(indices, order, round(part * len(indices)))
