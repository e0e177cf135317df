"""`rm_manifest.json`: what a consumer needs to give a model's sequences the scores it was trained to give.

The dataclasses below, with `GoldenItem` and `Noise`, are the schema. `Manifest` is the file's outermost object, and
docs/manifest.md describes the schema for people. Every key must be present, and no other; unknown values are null.
Files of earlier versions are read as far as they go.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from qlora_rm.artifacts.base_hash import hash_of_base
from qlora_rm.artifacts.golden import Drift, GoldenItem, make_golden
from qlora_rm.artifacts.hashes import fingerprint, hash_files
from qlora_rm.artifacts.manifest_bounds import require_sane
from qlora_rm.artifacts.manifest_versions import SCHEMA_VERSION, content_hash, content_of, require_own_hash
from qlora_rm.artifacts.noise import Noise
from qlora_rm.artifacts.typed_json import read_as
from qlora_rm.backbone.layouts import LAST, ScorePosition
from qlora_rm.backbone.paths import is_local
from qlora_rm.backbone.precision import DtypeName
from qlora_rm.config import Quantization
from qlora_rm.errors import UserError
from qlora_rm.preferences.clock import fixed_date, original
from qlora_rm.preferences.text_as import Kind, text_as_of
from qlora_rm.preferences.tokenization import EOS_RULE, OverLong, Tokenization

__all__ = ["Base", "Contract", "Manifest", "Merge", "Reward", "Step", "Training", "make_contract", "make_golden"]

FILE_NAME = "rm_manifest.json"
SCORE_POSITION = LAST
"""The value in files of versions 1 and 2, whatever the model."""
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
        chat_template_sha256: of the template's text; null if there is none.
        bos_token_id, eos_token_id, pad_token_id: the tokenizer's; no sequence contains the pad token.
        eos_rule: where sequences get an end-of-text token, in words.
        max_length: the longest sequence in tokens; null: no limit.
        over_long: the treatment of longer sequences: "truncate_prompt", "drop" or "error".
        rotary_length: the length in tokens whose rotary scaling every sequence gets, if the base would choose the
            scaling by the longest sequence of a batch; null: the base's scaling does not depend on length.
        score_position: where the score is read: "last token that is not pad", "first token", "all tokens that are not
            pad", or "model's own choice". Files of versions 1 and 2 name the last token for every model.
        date: the start of training in ISO format, if the chat template reads the clock; the saved template contains
            this date. null: the template does not read the clock, or an earlier version wrote the file.
        trained_on: the kinds of the training rows: "text", "turns", "token_ids"; null in files of earlier versions.
        text_as: how a prompt and a response in plain text are scored: as "turns", one of the user and one of the
            assistant, or as "text", one after the other; null in files of earlier versions, where the golden items
            decide.
    """

    chat_template_sha256: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int
    eos_rule: str
    max_length: int | None
    over_long: OverLong
    rotary_length: int | None = None
    score_position: ScorePosition = SCORE_POSITION
    date: str | None = None
    trained_on: list[Kind] | None = None
    text_as: Literal["turns", "text"] | None = None


@dataclass(frozen=True)
class Base:
    """The backbone that the adapter was trained on.

    Attributes:
        name_or_path: an absolute path or a hub id.
        revision: of the hub's repository; null: its latest.
        config_sha256: of its config.json.
        weights_fingerprint: sha256 over names, sizes, headers and data samples of its safetensors files; null if it has
            none.
        weights_sha256: over every byte of its weight files, if the run had `--verify_base full`; else null.
    """

    name_or_path: str
    revision: str | None
    config_sha256: str | None
    weights_fingerprint: str | None = None
    weights_sha256: str | None = None

    @classmethod
    def of(cls, name_or_path: str, revision: str | None = None) -> Self:
        name = str(Path(name_or_path).expanduser().resolve()) if is_local(name_or_path) else name_or_path
        return cls(name, revision, hash_of_config(name, revision), fingerprint(name, revision))

    def changes(self, name_or_path: str | None = None) -> list[str]:
        """What differs between the base, or its replacement, and the base in training; each in a few words."""
        now = Base.of(name_or_path or self.name_or_path, None if name_or_path else self.revision)
        pairs = (
            ("its config.json", self.config_sha256, now.config_sha256),
            ("its weights", self.weights_fingerprint, now.weights_fingerprint),
        )
        changed = [what for what, then, today in pairs if then is not None and then != today]
        if self.weights_sha256 is not None and not changed:
            name, revision = name_or_path or self.name_or_path, None if name_or_path else self.revision
            return [] if hash_of_base(name, revision) == self.weights_sha256 else ["its weights (sha256 of every byte)"]
        return changed


@dataclass(frozen=True)
class Training:
    """The training data, objective and length.

    Attributes:
        steps: number of optimizer steps.
        objective: its settings by name.
        data_fingerprint: hash of the comparisons, in their order.
        data_report: counts of the rows read and dropped, by kind.
    """

    steps: int
    objective: dict[str, Any]
    data_fingerprint: str | None
    data_report: dict[str, Any]


@dataclass(frozen=True)
class Reward:
    """Mean and standard deviation of the held-out responses' scores.

    Attributes:
        mean, std: in the units of a score.
        n: number of responses.
    """

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Merge:
    """How the adapter was added to its base.

    Attributes:
        method: in words.
        dtype: storage dtype of the merged weights, "bf16" or "fp32".
        compared_in: dtype in which the merged model's golden scores were computed.
        drift: largest distance of these scores from the golden scores.
        base: "dequantized", the weights of the quantized base in training, or "original", those before quantization.
    """

    method: str
    dtype: Literal["bf16", "fp32"]
    compared_in: DtypeName
    drift: float
    base: Literal["dequantized", "original"] = "dequantized"


StepName = Literal["merge", "requantize", "export"]


@dataclass(frozen=True)
class Step:
    """A change of the model after training, and its effect on the golden scores.

    Attributes:
        name: "merge", "requantize" or "export".
        settings: by name.
        drift: largest distance between the golden scores before the step and those of the written model; null for a
            step that changes no weights.
        flips: number of golden pairs that changed their order.
        pairs: number of golden pairs whose scores were clearly apart before.
        scores: the golden items' scores from this step on, one list each, if the step changes them on purpose; null:
            they do not change.
        versions: of the libraries that performed the step.
    """

    name: StepName
    settings: dict[str, Any]
    drift: float | None
    flips: int
    pairs: int
    scores: list[list[float]] | None = None
    versions: dict[str, str] = field(default_factory=lambda: library_versions())

    @classmethod
    def of(
        cls, name: StepName, settings: dict[str, Any], moved: Drift | None, scores: list[list[float]] | None = None
    ) -> Self:
        if moved is None:
            return cls(name, settings, None, 0, 0, scores)
        return cls(name, settings, moved.largest, moved.flips, moved.pairs, scores)


@dataclass(frozen=True)
class Manifest:
    """The file's outermost object.

    Attributes:
        contract: how text becomes a score.
        base: the backbone that the adapter was trained on.
        quantization: of the base in training: "none", "4bit" or "8bit".
        compute_dtype: of the training run's autocast: "fp32", "bf16" or "fp16".
        training: null in a file written by hand.
        reward: null without held-out comparisons.
        golden: texts, token ids and their scores after training; empty in a checkpoint of an unfinished run.
        noise: how far rounding alone moves the golden scores, by the dtype of the arithmetic: "fp32", "bf16", "fp16"; a
            dtype that was not measured is absent.
        merge: null for adapters and fully fine-tuned models.
        history: the steps since training, in order.
        files: sha256 by name of the files in the folder that a consumer loads (weights, configurations, tokenizer,
            template, code), at the time this file was written.
        versions: of the libraries that trained the model.
        schema_version: of this file. Version 1 holds no hashes of files, versions 2 and 3 none of configurations and
            code.
        content_sha256: of all other content of this file, to detect accidental changes; null in a file written by hand
            and in files of earlier versions. It is computed over the JSON with sorted keys and without white space.
    """

    contract: Contract
    base: Base
    quantization: Quantization
    compute_dtype: DtypeName
    training: Training | None = None
    reward: Reward | None = None
    golden: list[GoldenItem] = field(default_factory=list)
    noise: dict[DtypeName, Noise] = field(default_factory=dict)
    merge: Merge | None = None
    history: list[Step] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    schema_version: int = SCHEMA_VERSION
    content_sha256: str | None = field(default=None, compare=False)

    def expected(self) -> list[GoldenItem]:
        """The golden items with the scores that this copy of the model must give.

        These are the scores after training, or those of the last step that changed them on purpose.
        """
        changed = [step.scores for step in self.history if step.scores is not None]
        if not changed:
            return self.golden
        return [dataclasses.replace(item, scores=scores) for item, scores in zip(self.golden, changed[-1], strict=True)]

    def after(self, step: Step, **changes: Any) -> Self:
        """The manifest with one more step in its history."""
        return dataclasses.replace(self, history=[*self.history, step], **changes)

    def save(self, folder: str | os.PathLike[str], known: dict[str, str] | None = None) -> None:
        """Write `rm_manifest.json` into `folder`, after all other files, whose hashes it holds.

        It is written to a temporary file and then renamed, so that no consumer sees half a file.

        Arguments:
            known: sha256 of files by name, which are not computed again.
        """
        path = Path(folder) / FILE_NAME
        beside = path.with_name(f"{FILE_NAME}.{os.getpid()}")
        content = asdict(self) | {"files": hash_files(Path(folder), known), "schema_version": SCHEMA_VERSION}
        try:
            content = json.loads(json.dumps(content, allow_nan=False))
            content["content_sha256"] = content_hash(content)
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        except ValueError:
            raise UserError(
                f"{path} was not written: a score or statistic of this model is not finite. Train again with a lower learning "
                "rate."
            ) from None
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read the manifest of `folder`.

        Raises:
            NoManifest: there is none, or only a newer qlora_rm can read it.
            UserError: it is not JSON, has keys, types, words or numbers that the schema does not allow, or was changed.
        """
        path = Path(folder) / FILE_NAME
        content = content_of(path)
        manifest = read_as(cls, content, str(path))
        require_sane(content, str(path))
        require_own_hash(content, path)
        return manifest


def make_contract(
    tokenizer: PreTrainedTokenizerBase,
    tokenization: Tokenization,
    *,
    rotary_length: int | None = None,
    trained_on: Sequence[Kind] | None = None,
) -> Contract:
    """Describe this tokenizer and tokenization as a contract; a loaded model determines where the score is read.

    Arguments:
        trained_on: the kinds of the training rows; None if they are not known.
    """
    assert tokenizer.pad_token_id is not None
    return Contract(
        chat_template_sha256=hash_of_template(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_rule=EOS_RULE,
        max_length=tokenization.max_length,
        over_long=tokenization.over_long,
        rotary_length=rotary_length,
        date=fixed_date(tokenizer.chat_template),
        trained_on=None if trained_on is None else sorted(trained_on),
        text_as=None if trained_on is None else text_as_of(trained_on),
    )


def hash_of_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """sha256 of the chat template; several named templates count as one JSON object."""
    return _hash_of(tokenizer.chat_template)


def has_trained_template(tokenizer: PreTrainedTokenizerBase, contract: Contract) -> bool:
    """Whether the tokenizer's chat template is the contract's.

    Earlier versions saved templates that read the clock unchanged; loading fixes their date.
    """
    template = tokenizer.chat_template
    hashes = {_hash_of(template), *([_hash_of(original(template))] if contract.date is None else [])}
    return contract.chat_template_sha256 in hashes


def _hash_of(template: str | dict[str, str] | None) -> str | None:
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_of_config(name_or_path: str, revision: str | None = None) -> str | None:
    """sha256 of a model's config.json; None if it is not available."""
    try:
        path = cached_file(name_or_path, "config.json", revision=revision)
        return hashlib.sha256(Path(str(path)).read_bytes()).hexdigest()
    except OSError:
        return None


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries whose arithmetic or file formats determine the scores."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
