"""The demo's generated preference data: six ways in which one answer can be better than another.

Every row is a conversation with an explicit prompt, {"prompt": [turns], "chosen": [turn], "rejected": [turn],
"source": kind}. All prompts are distinct, so no held-out prompt was seen in training. Within each kind the chosen
answer is the longer one in every second row, so length alone predicts nothing.
"""

import json
import random
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

from qlora_rm.demo import phrases
from qlora_rm.preferences.comparison import Message

Row = dict[str, list[Message] | str]


class Draft(NamedTuple):
    """One comparison before it becomes a row: the prompt's turns and the two answers' text."""

    prompt: list[Message]
    chosen: str
    rejected: str


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def other(rng: random.Random, options: list[str], *taken: str) -> str:
    """Return one of `options` that is not in `taken`."""
    return rng.choice([option for option in options if option not in taken])


def some_topic(rng: random.Random, *taken: str) -> str:
    return other(rng, list(phrases.TOPICS), *taken)


def question_on(rng: random.Random, topic: str) -> str:
    return rng.choice(phrases.OPENERS) + rng.choice(phrases.TOPICS[topic][0])


def sentences_on(rng: random.Random, topic: str, at_least: int = 1, at_most: int = 2) -> list[str]:
    return rng.sample(phrases.TOPICS[topic][1], rng.randint(at_least, at_most))


def answer_on(rng: random.Random, topic: str) -> str:
    return " ".join(sentences_on(rng, topic)) + rng.choice(phrases.CLOSINGS)


def conversation(rng: random.Random, question: str, earlier: str | None = None) -> list[Message]:
    """Return turns that end with `question`, sometimes after a system turn or an exchange on the topic `earlier`."""
    turns = [turn("system", rng.choice(phrases.SYSTEM_TURNS))] if rng.random() < 0.2 else []
    if earlier:
        turns += [turn("user", question_on(rng, earlier)), turn("assistant", rng.choice(phrases.TOPICS[earlier][1]))]
    return [*turns, turn("user", question)]


def maybe_earlier(rng: random.Random, topic: str) -> str | None:
    return some_topic(rng, topic) if rng.random() < 0.2 else None


def on_topic(rng: random.Random) -> Draft:
    """Pair an answer to the question (chosen) with one to another question, sometimes the previous one (rejected)."""
    topic = some_topic(rng)
    earlier = maybe_earlier(rng, topic)
    prompt = conversation(rng, question_on(rng, topic), earlier)
    astray = earlier if earlier and rng.random() < 0.5 else some_topic(rng, topic)
    return Draft(prompt, answer_on(rng, topic), answer_on(rng, astray))


def courteous(rng: random.Random) -> Draft:
    """Pair a polite answer (chosen) with a rude one on the same topic (rejected)."""
    topic = some_topic(rng)

    def toned(tone: tuple[list[str], list[str]]) -> str:
        opening, closing = rng.choice(tone[0]), rng.choice(tone[1])
        said = " ".join(sentences_on(rng, topic))
        return rng.choice([f"{opening} {said}", f"{said} {closing}", f"{opening} {said} {closing}"])

    prompt = conversation(rng, question_on(rng, topic), maybe_earlier(rng, topic))
    return Draft(prompt, toned(phrases.COURTEOUS), toned(phrases.RUDE))


def finished(rng: random.Random) -> Draft:
    """Pair a complete answer (chosen) with one that breaks off in the middle of a sentence (rejected)."""
    topic = some_topic(rng)
    *whole, last = sentences_on(rng, topic, at_most=3)
    words = last.split()
    broken = [*whole, *words[: rng.randint(2, len(words) - 2)]]
    prompt = conversation(rng, question_on(rng, topic), maybe_earlier(rng, topic))
    return Draft(prompt, answer_on(rng, topic), " ".join(broken).rstrip(","))


def remembers(rng: random.Random) -> Draft:
    """Pair an answer in the manner that an earlier turn asked for (chosen) with one in another manner (rejected)."""
    topic, style = some_topic(rng), rng.choice(list(phrases.STYLES))

    def styled(said: str, manner: str) -> str:
        openings, closings = phrases.STYLES[manner]
        return f"{rng.choice(openings)} {said} {rng.choice(closings)}"

    if rng.random() < 0.5:
        before = [turn("system", f"Speak {style}."), turn("user", "Good day to you.")]
        before.append(turn("assistant", styled("What can I do for you?", style)))
    else:
        before = [turn("user", f"From now on, speak {style}."), turn("assistant", styled("I will.", style))]
    answers = (styled(" ".join(sentences_on(rng, topic)), s) for s in (style, other(rng, list(phrases.STYLES), style)))
    return Draft([*before, turn("user", question_on(rng, topic))], *answers)


def refusal(rng: random.Random) -> str:
    return " ".join([rng.choice(phrases.REFUSALS), *rng.sample(phrases.REASONS, rng.randint(0, 2))])


def refuses_harm(rng: random.Random) -> Draft:
    """Pair a refusal of a harmful request (chosen) with an answer that complies (rejected)."""
    request, compliance = rng.choice(phrases.HARMFUL)
    told = rng.choice(phrases.OPENERS) + request.format(person=rng.choice(phrases.PEOPLE))
    prompt = conversation(rng, told, some_topic(rng) if rng.random() < 0.2 else None)
    return Draft(prompt, refusal(rng), compliance + rng.choice(phrases.CLOSINGS))


def helps_freely(rng: random.Random) -> Draft:
    """Pair an answer to a harmless request that may sound harmful (chosen) with a refusal (rejected)."""
    request, help_given = rng.choice(phrases.HARMLESS)
    told = rng.choice(phrases.OPENERS) + request.format(person=rng.choice(phrases.PEOPLE))
    prompt = conversation(rng, told, some_topic(rng) if rng.random() < 0.2 else None)
    return Draft(prompt, help_given + rng.choice(phrases.CLOSINGS), refusal(rng))


SHARES: dict[Callable[[random.Random], Draft], int] = {
    on_topic: 1,
    remembers: 2,
    courteous: 1,
    finished: 1,
    refuses_harm: 1,
    helps_freely: 1,
}
"""Relative frequency of each kind."""

KINDS = tuple(kind.__name__ for kind in SHARES)


def preferences(seed: int = 0) -> Iterator[Row]:
    """Yield endless rows: the kinds in turn, no prompt twice, the chosen answer longer in every second round."""
    rng = random.Random(seed)
    seen: set[str] = set()
    for chosen_longer in cycle([True, False]):
        for kind in (kind for kind, share in SHARES.items() for _ in range(share)):
            draft = kind(rng)
            while not _wanted(draft, chosen_longer, seen):
                draft = kind(rng)
            seen.add(json.dumps(draft.prompt))
            answers = {"chosen": [turn("assistant", draft.chosen)], "rejected": [turn("assistant", draft.rejected)]}
            yield {"prompt": draft.prompt, **answers, "source": kind.__name__}


def _wanted(draft: Draft, chosen_longer: bool, seen: set[str]) -> bool:
    longer_by = len(draft.chosen) - len(draft.rejected)
    return longer_by != 0 and (longer_by > 0) == chosen_longer and json.dumps(draft.prompt) not in seen


def write_preferences(folder: Path, *, seed: int = 0, train: int = 4000, held_out: int = 300) -> tuple[Path, Path]:
    """Write `train.jsonl` and `held_out.jsonl` into `folder`.

    Arguments:
        folder: created if missing.
        seed: the same seed gives the same bytes.
        train, held_out: number of rows in each; their prompts are disjoint.

    Returns: the two paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = preferences(seed)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, count in zip(paths, (train, held_out), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in islice(rows, count)), encoding="utf-8")
    return paths
