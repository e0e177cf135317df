"""Bounds on a manifest's values beyond their types: finite, of one shape, and within limits."""

import re
from datetime import datetime
from typing import Any

from qlora_rm.errors import UserError
from qlora_rm.preferences.tokenization import LARGEST_ID
from qlora_rm.preferences.values import kind_of

LARGEST_SCORE = 1e9
"""Bound on the absolute value of scores and their statistics. Trained scores are around 10 in absolute value."""

LARGEST_COUNT = 1 << 48
LONGEST = 1 << 31
"""Tokens of the longest sequence that a contract may name."""

SUBFOLDER = "additional_chat_templates/"
"""The only subfolder of a tokenizer's files that transformers reads."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def require_sane(content: dict[str, Any], where: str) -> None:
    """Check the values of a manifest whose types are right.

    Arguments:
        content: the parsed file, with the keys of the newest schema.
        where: the file name for messages.

    Raises:
        UserError: a value is out of bounds, or contradicts another one; the message names file, field and value.
    """
    _Values(where).check(content)


class _Values:
    def __init__(self, where: str) -> None:
        self.where = where

    def check(self, content: dict[str, Any]) -> None:
        self._contract(content["contract"])
        self._hashes(content)
        largest = self._golden(content["golden"])
        for step, done in enumerate(content["history"]):
            self._step(f"history[{step}]", done, content["golden"])
        for name, noise in content["noise"].items():
            self._noise(f"noise: {name}", noise, largest)
        if (reward := content["reward"]) is not None:
            self._within("reward: mean", reward["mean"], -LARGEST_SCORE, LARGEST_SCORE)
            self._within("reward: std", reward["std"], 0, LARGEST_SCORE)
            self._within("reward: n", reward["n"], 0, LARGEST_COUNT)
        if (training := content["training"]) is not None:
            self._within("training: steps", training["steps"], 0, LARGEST_COUNT)
        if (merge := content["merge"]) is not None:
            self._within("merge: drift", merge["drift"], 0, LARGEST_SCORE)

    def _contract(self, contract: dict[str, Any]) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            self._within(f"contract: {name}", contract[name], 0, LARGEST_ID - 1)
        for name in ("max_length", "rotary_length"):
            self._within(f"contract: {name}", contract[name], 1, LONGEST)
        if (date := contract["date"]) is not None:
            self._require(_is_date(date), "contract: date", date, "a moment in ISO format")
        kinds = contract["trained_on"]
        if kinds is not None:
            self._require(len(set(kinds)) == len(kinds), "contract: trained_on", kinds, "a list without repetition")

    def _hashes(self, content: dict[str, Any]) -> None:
        base = content["base"]
        named = {
            "contract: chat_template_sha256": content["contract"]["chat_template_sha256"],
            "base: config_sha256": base["config_sha256"],
            "base: weights_fingerprint": base["weights_fingerprint"],
            "content_sha256": content["content_sha256"],
            **{f"files: {name:.60}": value for name, value in content["files"].items()},
        }
        for field, value in named.items():
            ok = value is None or _SHA256.fullmatch(value) is not None
            self._require(ok, field, value, "a sha256 in 64 hexadecimal digits")
        for name in content["files"]:
            plain = name.removeprefix(SUBFOLDER)
            ok = plain not in ("", ".", "..") and not set(plain) & {"/", "\\", "\0"}
            self._require(ok, "files", name, "the name of a file in the folder")
        self._require(
            bool(base["name_or_path"].strip()), "base: name_or_path", base["name_or_path"], "a folder or hub id"
        )

    def _golden(self, golden: list[dict[str, Any]]) -> float:
        """Check the golden items; return the largest absolute value of a score."""
        largest = 0.0
        for place, item in enumerate(golden):
            where = f"golden[{place}]"
            lists = [item[name] for name in ("responses", "token_ids", "scores")]
            counts = [len(one) for one in lists]
            one_each = counts[0] > 0 and len(set(counts)) == 1
            self._require(one_each, where, counts, "one or more responses, with as many token_ids and scores")
            self._scores(f"{where}: scores", item["scores"])
            largest = max([largest, *map(abs, item["scores"])])
            kinds = {kind_of(response) for response in item["responses"]}
            of_a_kind = len(kinds) == 1 and None not in kinds
            self._require(of_a_kind, f"{where}: responses", item["responses"], "text, turns or token ids each")
            turns = kinds == {"turns"}
            for name, value in (("prompt", item["prompt"]), *(("responses", one) for one in item["responses"])):
                ok = isinstance(value, list) and all(map(_is_turn, value)) if turns else isinstance(value, (str, list))
                self._require(
                    ok, f"{where}: {name}", value, "turns with role and content" if turns else "text or token ids"
                )
            for ids in item["token_ids"]:
                ok = bool(ids) and all(0 <= token < LARGEST_ID for token in ids)
                self._require(ok, f"{where}: token_ids", ids, f"token ids from 0 to {LARGEST_ID - 1}")
        return largest

    def _step(self, where: str, step: dict[str, Any], golden: list[dict[str, Any]]) -> None:
        self._within(f"{where}: drift", step["drift"], 0, LARGEST_SCORE)
        self._within(f"{where}: pairs", step["pairs"], 0, LARGEST_COUNT)
        self._within(f"{where}: flips", step["flips"], 0, step["pairs"])
        if (scores := step["scores"]) is None:
            return
        counts, wanted = [len(of_item) for of_item in scores], [len(item["scores"]) for item in golden]
        self._require(counts == wanted, f"{where}: scores", counts, "one score for each golden response")
        for place, of_item in enumerate(scores):
            self._scores(f"{where}: scores[{place}]", of_item)

    def _noise(self, where: str, noise: dict[str, float], largest_score: float) -> None:
        """Check that the noise statistics do not contradict each other and are no larger than the scores allow."""
        largest = noise["largest"]
        self._within(f"{where}: largest", largest, 0, 10 * (1 + largest_score))
        slack = 1e-6 * (1 + largest)
        self._within(f"{where}: typical", noise["typical"], 0, largest + slack)
        self._within(f"{where}: layouts", noise["layouts"], 0, 2 * largest + slack)

    def _scores(self, field: str, scores: list[float]) -> None:
        for place, score in enumerate(scores):
            self._within(f"{field}[{place}]", score, -LARGEST_SCORE, LARGEST_SCORE)

    def _within(self, field: str, value: float | None, low: float, high: float) -> None:
        ok = value is None or low <= value <= high
        self._require(ok, field, value, f"a number from {low:g} to {high:g}")

    def _require(self, ok: bool, field: str, value: Any, wanted: str) -> None:
        if not ok:
            raise UserError(f"{self.where}: {field} is {value!r:.60}. Allowed: {wanted}.")


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
