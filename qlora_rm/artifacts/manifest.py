"""`rm_manifest.json`: what a reader must know to give a model's sequences the scores it was trained to give.

The schema is the dataclasses below; `Manifest` is the file's outermost object. Every key must be there and no other;
what may be unknown is null.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import types
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self, get_args, get_origin, get_type_hints

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from qlora_rm.artifacts.golden import GoldenItem, make_golden
from qlora_rm.backbone.paths import is_local
from qlora_rm.errors import UserError
from qlora_rm.preferences.tokenization import EOS_RULE, Tokenization

__all__ = ["Base", "Contract", "Manifest", "Merge", "Reward", "Training", "make_contract", "make_golden"]

FILE_NAME = "rm_manifest.json"
SCHEMA_VERSION = 1
SCORE_POSITION = "last token that is not pad"
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "deepspeed",
    "tokenizers",
    "qlora_rm",
)


@dataclass(frozen=True)
class Contract:
    """How text becomes token ids, and at which of them the score is read.

    Attributes:
        chat_template_sha256: of the template's text; null where there is none.
        eos_rule: in words.
        max_length, over_long: the longest sequence in tokens (null: no limit), and what is done with longer ones.
    """

    chat_template_sha256: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int
    eos_rule: str
    max_length: int | None
    over_long: str
    score_position: str = SCORE_POSITION


@dataclass(frozen=True)
class Base:
    """The backbone the adapter stands on: an absolute path or a hub id, its revision, its config.json's sha256."""

    name_or_path: str
    revision: str | None
    config_sha256: str | None

    @classmethod
    def of(cls, name_or_path: str, revision: str | None = None) -> Self:
        name = str(Path(name_or_path).expanduser().resolve()) if is_local(name_or_path) else name_or_path
        return cls(name, revision, hash_of_config(name, revision))


@dataclass(frozen=True)
class Training:
    """What the model was trained on and how far: optimizer steps, the objective's settings, the data's fingerprint."""

    steps: int
    objective: dict[str, Any]
    data_fingerprint: str | None
    data_report: dict[str, Any]


@dataclass(frozen=True)
class Reward:
    """Mean and standard deviation of the n held-out responses' scores."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Merge:
    """How the adapter was added to its base.

    Attributes:
        dtype: storage dtype of the merged weights, "bf16" or "fp32".
        compared_in: dtype in which the merged model's golden scores were computed.
        drift: their largest distance from the golden scores.
    """

    method: str
    dtype: str
    compared_in: str
    drift: float


@dataclass(frozen=True)
class Manifest:
    """The file's outermost object.

    Attributes:
        quantization: of the base under training: "none", "4bit" or "8bit".
        compute_dtype: of the training run's autocast: "fp32", "bf16" or "fp16".
        golden: empty in a checkpoint of an unfinished run.
        merge: null for adapters and fully fine-tuned models.
    """

    contract: Contract
    base: Base
    quantization: str
    compute_dtype: str
    training: Training | None = None
    reward: Reward | None = None
    golden: list[GoldenItem] = field(default_factory=list)
    merge: Merge | None = None
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    schema_version: int = SCHEMA_VERSION

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `rm_manifest.json` into `folder`: beside, then renamed, so that no reader sees half a file."""
        path = Path(folder) / FILE_NAME
        beside = path.with_name(f"{FILE_NAME}.{os.getpid()}")
        beside.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """The manifest of `folder`.

        Raises:
            UserError: missing, not JSON, of another schema version, or with keys or types the schema does not have.
        """
        path = Path(folder) / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder} has no {FILE_NAME}: it was not written by qlora-rm, or not to the end."
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}. Restore it from the training run's output.") from None
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {found!r}; this qlora_rm reads version {SCHEMA_VERSION}. Use the qlora_rm "
                "that wrote it, or a newer one."
            )
        return _read(cls, content, str(path))


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as the schema's type `kind` (dataclass, list, optional or plain), or a `UserError` naming the place."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where} must be an object, not {value!r:.60}.")
        hints = get_type_hints(kind)
        for key in value.keys() - hints.keys():
            near = difflib.get_close_matches(key, hints, 1)
            raise UserError(f"{where} has an unknown key {key!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        for key in hints.keys() - value.keys():
            raise UserError(f"{where} lacks the key {key!r}.")
        return kind(**{key: _read(hint, value[key], f"{where}: {key}") for key, hint in hints.items()})
    if get_origin(kind) is types.UnionType:
        return None if value is None else _read(get_args(kind)[0], value, where)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, not {value!r:.60}.")
        return [_read(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    wanted: Any = {float: (int, float), Any: object}.get(kind, get_origin(kind) or kind)
    if not isinstance(value, wanted) or (kind in (int, float) and isinstance(value, bool)):
        raise UserError(f"{where} must be of type {getattr(kind, '__name__', kind)}, not {value!r:.60}.")
    return value


def make_contract(tokenizer: PreTrainedTokenizerBase, tokenization: Tokenization) -> Contract:
    """The contract that this tokenizer under this tokenization fulfils."""
    assert tokenizer.pad_token_id is not None
    return Contract(
        chat_template_sha256=hash_of_template(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_rule=EOS_RULE,
        max_length=tokenization.max_length,
        over_long=tokenization.over_long,
    )


def hash_of_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """sha256 of the chat template; several named templates count as one JSON object."""
    template = tokenizer.chat_template
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_of_config(name_or_path: str, revision: str | None = None) -> str | None:
    """sha256 of a model's config.json; None where it cannot be had."""
    try:
        path = cached_file(name_or_path, "config.json", revision=revision)
        return hashlib.sha256(Path(str(path)).read_bytes()).hexdigest()
    except OSError:
        return None


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries whose arithmetic or file formats decide the scores."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
