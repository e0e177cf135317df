"""Check whether a model folder matches its manifest; every command calls this before it scores.

A command that loads a changed file would give other scores than the manifest proves. A changed chat template may do
worse: it is a program. These checks therefore run before a tokenizer renders anything and before weights are read.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from qlora_rm.artifacts.hashes import changed_files
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.backbone.json_files import read_json
from qlora_rm.backbone.paths import is_local
from qlora_rm.errors import UserError
from qlora_rm.preferences.tokenization import EOS_RULE

RESTORE = "Restore it from the training run's output."
SHOWN = 5
NO_HASHES = 1
"""The schema version that recorded no hashes of files."""

WITHOUT_CONFIGURATIONS = 3
"""The last schema version that recorded no hashes of configurations and code."""


def require_as_written(folder: str, manifest: Manifest, way_out: str = "") -> None:
    """Refuse a folder whose files or configuration differ from its manifest.

    Hashes of weights come from the cache if the file is unchanged (`hash_cache`); small files are always hashed.

    Arguments:
        way_out: a sentence for the end of the message.

    Raises:
        UserError: something has changed; the message names the first changes.
    """
    lines = [*file_changes(folder, manifest, cached=True), *config_changes(folder, manifest), *rule_changes(manifest)]
    if lines:
        more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise UserError(
            f"{folder} is not as its manifest says: {'; '.join(lines[:SHOWN])}{more}. {RESTORE}{way_out and f' {way_out}'}"
        )


def file_changes(
    folder: str, manifest: Manifest, *, cached: bool = False, names: Collection[str] | None = None
) -> list[str]:
    """How the files that a consumer loads differ from those that the manifest lists; one line each.

    Arguments:
        cached: take hashes of large files from the cache.
        names: check only these files.
    """
    if manifest.schema_version <= NO_HASHES:
        return []
    complete = manifest.schema_version > WITHOUT_CONFIGURATIONS
    return changed_files(folder, manifest.files, complete=complete, cached=cached, names=names)


def rule_changes(manifest: Manifest) -> list[str]:
    """Rules of the contract that this version does not follow; one line each."""
    if manifest.contract.eos_rule == EOS_RULE:
        return []
    return [f"its eos_rule is {manifest.contract.eos_rule!r:.80}, and this version's is {EOS_RULE!r}"]


def config_changes(folder: str, manifest: Manifest) -> list[str]:
    """How the configurations differ from the manifest in what a consumer reads from them; one line each.

    Raises:
        UserError: a configuration is not a JSON object.
    """
    path = Path(folder) / "adapter_config.json"
    if path.exists():
        return list(_adapter_changes(_object(path), manifest))
    return list(_model_changes(_object(Path(folder) / "config.json", strict=False), manifest))


def _object(path: Path, strict: bool = True) -> dict[str, Any]:
    try:
        found = read_json(path, RESTORE, strict=strict)
    except FileNotFoundError:
        raise UserError(f"{path} is gone. {RESTORE}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold an object, not {found!r:.60}. {RESTORE}")
    return found


def _adapter_changes(config: dict[str, Any], manifest: Manifest) -> Iterator[str]:
    for key, wanted in (("peft_type", "LORA"), ("task_type", "SEQ_CLS")):
        if config.get(key) != wanted:
            yield f"adapter_config.json: {key} is {config.get(key)!r:.60} instead of {wanted!r}"
    named, base = config.get("base_model_name_or_path"), manifest.base.name_or_path
    if not isinstance(named, str) or not _same_place(named, base):
        yield f"adapter_config.json: base_model_name_or_path is {named!r:.200}, and the manifest's base is {base!r}"


def _same_place(named: str, base: str) -> bool:
    """Whether both name one base. The manifest's path is absolute; PEFT saves it as typed, relative to any folder."""
    if named == base:
        return True
    if not is_local(base):
        return False
    path = Path(named).expanduser()
    if path.resolve() == Path(base).resolve():
        return True
    meant = [part for part in path.parts if part not in (".", "..")]
    return not path.is_absolute() and bool(meant) and list(Path(base).parts[-len(meant) :]) == meant


def _model_changes(config: dict[str, Any], manifest: Manifest) -> Iterator[str]:
    names = config.get("architectures")
    known = isinstance(names, list) and len(names) == 1 and str(names[0]).endswith("ForSequenceClassification")
    if not known:
        yield f"config.json: architectures is {names!r:.80} instead of one name that ends in ForSequenceClassification"
    labels = config.get("id2label")
    count = config.get("num_labels", len(labels) if isinstance(labels, dict) else None)
    if count != 1 or (isinstance(labels, dict) and len(labels) != 1):
        yield f"config.json: the number of labels is {count!r:.60} instead of 1"
    text = config.get("text_config")
    pads = [part["pad_token_id"] for part in (config, text) if isinstance(part, dict) and "pad_token_id" in part]
    pad = manifest.contract.pad_token_id
    if not pads or any(type(found) is not int or found != pad for found in pads):
        yield f"config.json: pad_token_id is {(pads or [None])[-1]!r:.60} instead of {pad}"
