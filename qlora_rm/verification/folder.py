"""Verify that a reward model on disk is still the one that was trained: every check with its result."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from qlora_rm.artifacts.folders import artifact_kind
from qlora_rm.artifacts.head_names import HEAD_BIAS
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.artifacts.manifest_versions import NoManifest
from qlora_rm.artifacts.own_tokenizer import read_tokenizer
from qlora_rm.artifacts.stock import load_stock
from qlora_rm.artifacts.weights import BaseIsMissing
from qlora_rm.backbone.head import head_modules, is_in_head
from qlora_rm.backbone.precision import NAMES
from qlora_rm.backbone.safetensors_reader import Checkpoint
from qlora_rm.errors import UserError, first_line
from qlora_rm.progress import Phase
from qlora_rm.verification.checks import (
    Check,
    Subject,
    check_base,
    check_configuration,
    check_files,
    check_golden_ids,
    check_leftovers,
    check_scores,
    check_tokenizer,
    check_vocabulary,
    check_weights,
)
from qlora_rm.verification.signature import check_signature, public_key

T = TypeVar("T")
Tell = Callable[[Check], None]

COULD_NOT = (NoManifest, BaseIsMissing, PermissionError, MemoryError)
"""Errors that show nothing about the model: the check could not get what it needs."""


def verify(
    folder: str,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
    key: str | None = None,
    tell: Tell = lambda check: None,
) -> list[Check]:
    """Check an adapter or complete model that this project wrote against its manifest.

    A broken part gives a failing check with a remedy, and prevents only the checks that need it. Files are compared
    before anything is loaded: a changed chat template is not rendered, and changed code is not run.

    Arguments:
        key: a file with the public key that signed the manifest; None compares no signature.
        tell: called with each check as soon as its result is available.

    Raises:
        UserError: `folder` holds no model, or `key` cannot be used.
    """
    kind = artifact_kind(folder)
    signed_by = None if key is None else public_key(key)
    with Phase("verifying"):
        return _Verification(folder, kind == "adapter", base, trust_remote_code, tell).run(signed_by)


class _Verification:
    """One run of the checks; `checks` are the results so far."""

    def __init__(self, folder: str, is_adapter: bool, base: str | None, trusted: bool, tell: Tell) -> None:
        self.folder, self.is_adapter, self.base, self.trusted, self.tell = folder, is_adapter, base, trusted, tell
        self.checks: list[Check] = []

    def run(self, key: Any) -> list[Check]:
        if key is not None:
            self._group("signature", lambda: check_signature(self.folder, key))
            if not self._hold():
                return self.checks  # the folder is not trusted, and nothing in it is loaded
        manifest = self._part("manifest is readable", lambda: Manifest.load(self.folder))
        if manifest:
            self._group("files are those that were written", lambda: check_files(self.folder, manifest))
            self._group("configuration is the manifest's", lambda: check_configuration(self.folder, manifest))
        as_written = self._hold()
        tokenizer = self._part("tokenizer loads", lambda: read_tokenizer(self.folder, self.trusted and as_written))
        if manifest and tokenizer:
            self._group("tokenizer", lambda: check_tokenizer(manifest, tokenizer))
            self._group("golden token ids", lambda: check_golden_ids(manifest, tokenizer))
        subject = self._part("model loads", lambda: self._subject(self.trusted and as_written))
        if subject:
            self._group("weights", lambda: check_weights(subject))
        if subject and tokenizer:
            self._group("vocabulary", lambda: check_vocabulary(subject, tokenizer))
        if not self.is_adapter and manifest:
            self._group("no quantization leftovers", lambda: check_leftovers(self.folder, manifest))
        if manifest and subject and manifest.golden:
            self._group("scores", lambda: check_scores(subject, manifest))
        if self.is_adapter and manifest and subject:
            hold = any(check.name == "golden scores are given again" and check.ok for check in self.checks)
            self._group("base", lambda: check_base(manifest, self.base, scores_hold=hold))
        return self.checks

    def _hold(self) -> bool:
        return all(check.ok for check in self.checks)

    def _add(self, check: Check) -> None:
        self.checks.append(check)
        self.tell(check)

    def _part(self, name: str, read: Callable[[], T]) -> T | None:
        """Return the result of `read`, or None and a failing check: files under test may be broken in any way."""
        try:
            found = read()
        except Exception as error:
            self._add(_failed(name, error))
            return None
        self._add(Check(name, True))
        return found

    def _group(self, name: str, group: Callable[[], Iterator[Check]]) -> None:
        """Add the group's checks; an error in between is itself a failing check."""
        try:
            for check in group():  # checks made before an error are kept
                self._add(check)
        except Exception as error:
            self._add(_failed(name, error))

    def _subject(self, trusted: bool) -> Subject:
        return _adapter(self.folder, self.base, trusted) if self.is_adapter else load_whole(self.folder, trusted)


def _failed(name: str, error: Exception) -> Check:
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
    causes = (error, error.__cause__)
    no_memory = any(type(cause).__name__ == "OutOfMemoryError" for cause in causes)
    return Check(name, False, said, checked=not (no_memory or any(isinstance(cause, COULD_NOT) for cause in causes)))


def _adapter(folder: str, base: str | None, trust_remote_code: bool) -> Subject:
    """Load the adapter on its base, as this project does."""
    loaded = RewardModel.load(folder, base=base, trust_remote_code=trust_remote_code, compare=False)
    peft = loaded.model
    assert isinstance(peft, PeftModel)
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    wanted = set(get_peft_model_state_dict(peft))
    # PEFT saves a copy of an adapted embedding, which a DeepSpeed run does not: the copy equals the base's own
    copies = {name for name in wanted if name.endswith(".base_layer.weight")} - saved
    head = {name: p for name, p in peft.named_parameters() if ".modules_to_save." in name}
    return Subject(peft, head, sorted(wanted - saved - copies), sorted(saved - wanted), loaded.computes_in)


def load_whole(folder: str, trust_remote_code: bool = False) -> Subject:
    """Load a complete model, as any consumer does, for its checks.

    The files may hold a zero bias of the head that the model has no place for: SGLang requires it.
    """
    model, info = load_stock(folder, trust_remote_code)
    names = head_modules(model)
    head = {name: p for name, p in model.named_parameters() if is_in_head(name, names)}
    missing = [*info["missing_keys"], *map(str, info["mismatched_keys"])]
    unread = set(info["unexpected_keys"])
    if HEAD_BIAS in unread:
        stored = Checkpoint.of_model(folder)
        if stored is not None and not stored[HEAD_BIAS].read().any():
            unread.remove(HEAD_BIAS)
    return Subject(model, head, sorted(missing), sorted(unread), NAMES[model.dtype])
