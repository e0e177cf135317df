"""Export a folder for one or more consumers, and verify it before it gets its name."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_rm.artifacts.as_written import require_as_written
from qlora_rm.artifacts.folders import artifact_kind, new_folder
from qlora_rm.artifacts.manifest import FILE_NAME, Manifest, Step
from qlora_rm.artifacts.own_tokenizer import read_tokenizer
from qlora_rm.config import ExportConfig, require
from qlora_rm.errors import UserError
from qlora_rm.exporting import common_checks
from qlora_rm.exporting import consumer_checks as reader_checks
from qlora_rm.exporting.choice import reader_named, require_readable
from qlora_rm.exporting.consumer import Reader
from qlora_rm.exporting.model_card import write_card
from qlora_rm.exporting.write import V4, VALUE, stored_dtype, write_adapter, write_whole
from qlora_rm.progress import Phase
from qlora_rm.verification.checks import Check, check_files
from qlora_rm.verification.folder import load_whole, verify

RECORD = "rm_export.json"


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        checks: all checks that ran; the folder exists only if all passed.
        notes: how the weights were placed, and warnings.
        unchecked: what could not be checked on this machine.
    """

    folder: str
    readers: list[str]
    checks: list[Check]
    notes: list[str]
    unchecked: list[str]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **asdict(self)}


class _Refused(Exception):
    """Raised to leave `new_folder` without creating the folder."""


def export(
    folder: str,
    names: list[str],
    output: str,
    config: ExportConfig | None = None,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write `folder` to `output` for the consumers called `names`, and check that it scores correctly in them.

    The weights are linked or copied unchanged, then loaded once from the new folder for the checks. The folder gets its
    name only if every check passes.

    Arguments:
        base: for an adapter, where its base is now; written into the exported adapter.

    Raises:
        UserError: a consumer does not exist or cannot load this kind of model, the consumers need different folders, the
            source is broken, or `output` exists and is not empty.
    """
    config = config or ExportConfig()
    readers = [reader_named(name) for name in dict.fromkeys(names)]
    kind = artifact_kind(folder)
    if (Path(folder) / FILE_NAME).exists():
        require_as_written(folder, Manifest.load(folder))
    require_readable(readers, folder, kind, trust_remote_code)
    _require_effect(kind, readers, config, base)
    manifest, evaluation = Manifest.load(folder), _read_evaluation(config.evaluation)
    manifest = manifest.after(Step.of("export", {"readers": [reader.name for reader in readers]}, None))
    untouched = list(check_files(folder, manifest))
    try:
        with Phase("exporting"), new_folder(output) as beside:
            if kind == "adapter":
                notes = write_adapter(Path(folder), beside, manifest, base, config.copy_weights, trust_remote_code)
                checks = [*untouched, *_check_adapter(beside, manifest, base, trust_remote_code)]
            else:
                notes = write_whole(Path(folder), beside, readers, manifest, config, trust_remote_code)
                checks = [*untouched, *_check_whole(beside, readers, manifest, config, trust_remote_code)]
            notes += filter(None, (reader_checks.clipping(reader, manifest) for reader in readers))
            exported = Exported(
                output, [reader.name for reader in readers], checks, notes, _unchecked(readers, manifest, config)
            )
            if not exported.ok:
                raise _Refused
            write_card(beside, output, readers, manifest, exported.unchecked, evaluation)
            record = json.dumps(exported.as_dict(), ensure_ascii=False, indent=1)
            (beside / RECORD).write_text(f"{record}\n", encoding="utf-8")
    except _Refused:
        pass
    return exported


def _require_effect(kind: str, readers: list[Reader], config: ExportConfig, base: str | None) -> None:
    """Raise a `UserError` for an option that has no effect on this export."""
    if kind == "adapter":
        for name, given in (("adapter", config.adapter), ("normalize", config.normalize), ("policy", config.policy)):
            require(not given, f"--{name} has no effect: an exported adapter is compared as it is. Leave it out.")
        return
    require(not base, "--base has no effect: the folder is a whole model, which has no base. Leave it out.")
    require(
        not config.policy or any(reader.shares_vocabulary for reader in readers),
        f"--policy has no effect: none of {', '.join(reader.name for reader in readers)} hands on its token ids. Leave it out.",
    )


def _check_adapter(folder: Path, manifest: Manifest, base: str | None, trust_remote_code: bool) -> list[Check]:
    return [
        *verify(str(folder), base=base, trust_remote_code=trust_remote_code),
        *reader_checks.check_adapter_files(folder),
        *reader_checks.check_rotation(manifest, base, trust_remote_code),
    ]


def _check_whole(
    folder: Path, readers: list[Reader], manifest: Manifest, config: ExportConfig, trust_remote_code: bool
) -> list[Check]:
    """Run every check of the common folder and of each consumer, on one loaded model."""
    tokenizer = read_tokenizer(str(folder), trust_remote_code)
    subject = load_whole(str(folder), trust_remote_code)
    checks = common_checks.check_whole(str(folder), manifest, tokenizer, subject)
    if config.adapter:
        checks += common_checks.check_head_is(folder, config.adapter)
    for reader in readers:
        checks += reader_checks.check_feed(reader, subject, manifest, tokenizer)
    if any(reader.reads_v4 for reader in readers):
        checks += reader_checks.check_v4(folder / V4 if (folder / V4).exists() else folder, manifest, tokenizer)
    if (folder / VALUE).exists():
        checks += reader_checks.check_value_model(folder / VALUE, subject, manifest)
    if any("head bias" in reader.writes for reader in readers):
        checks += reader_checks.check_head_bias(folder, subject)
    sharing = [reader.name for reader in readers if reader.shares_vocabulary]
    if sharing and config.policy:
        checks += reader_checks.check_policy(sharing, tokenizer, config.policy)
    rounding = [reader.name for reader in readers if reader.rounds]
    if rounding:
        checks += reader_checks.check_rounding(rounding, subject, manifest, stored_dtype(folder))
    return checks


def _unchecked(readers: list[Reader], manifest: Manifest, config: ExportConfig) -> list[str]:
    whats: dict[str, list[str]] = {}
    for reader in readers:
        for what in reader.unchecked:
            whats.setdefault(what, []).append(reader.name)
        if reader.shares_vocabulary and not config.policy:
            whats.setdefault("that the policy has these tokens and this template (--policy compares)", []).append(
                reader.name
            )
    unchecked = [f"{', '.join(names)}: {what}" for what, names in whats.items()]
    if manifest.merge is not None and not config.adapter:
        unchecked.append("that the head is the adapter's bit by bit (--adapter compares)")
    return unchecked


def _read_evaluation(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        assert {"accuracy", "interval", "wins"} <= found["overall"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{path} is no evaluation ({type(error).__name__}). Write one with `qlora-rm eval MODEL --dataset ROWS "
            f"--output {path}`."
        ) from error
    return found
