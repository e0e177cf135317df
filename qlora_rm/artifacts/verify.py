"""The proof that a reward model on disk still is the one that was trained: every check with its result."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from qlora_rm.artifacts.checks import (
    Check,
    Subject,
    check_base,
    check_files,
    check_golden_ids,
    check_leftovers,
    check_scores,
    check_tokenizer,
    check_vocabulary,
    check_weights,
)
from qlora_rm.artifacts.exporting.files import HEAD_BIAS
from qlora_rm.artifacts.load import RewardModel, artefact_kind, load_stock, read_tokenizer
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.artifacts.merging.checkpoint import Checkpoint
from qlora_rm.backbone.head import head_modules, is_in_head
from qlora_rm.backbone.precision import NAMES
from qlora_rm.errors import UserError, first_line
from qlora_rm.progress import Phase

T = TypeVar("T")


def verify(folder: str, *, base: str | None = None, trust_remote_code: bool = False) -> list[Check]:
    """Check an adapter or whole model that this project wrote against its manifest.

    A broken part gives a failing check with a way out, and keeps only those checks from running that need it.

    Raises:
        UserError: there is nothing of a model in `folder`.
    """
    with Phase("verifying"):
        return _verify(folder, base, trust_remote_code)


def _verify(folder: str, base: str | None, trust_remote_code: bool) -> list[Check]:
    kind = artefact_kind(folder)
    checks: list[Check] = []
    manifest = _part(checks, "manifest is readable", lambda: Manifest.load(folder))
    tokenizer = _part(checks, "tokenizer loads", lambda: read_tokenizer(folder, trust_remote_code))
    subject = _part(
        checks,
        "model loads",
        lambda: (
            _adapter(folder, base, trust_remote_code) if kind == "adapter" else load_whole(folder, trust_remote_code)
        ),
    )
    if manifest:
        _run(checks, "files", lambda: check_files(folder, manifest))
    if manifest and tokenizer:
        _run(checks, "tokenizer", lambda: check_tokenizer(manifest, tokenizer))
        _run(checks, "golden token ids", lambda: check_golden_ids(manifest, tokenizer))
    if subject:
        _run(checks, "weights", lambda: check_weights(subject))
    if subject and tokenizer:
        _run(checks, "vocabulary", lambda: check_vocabulary(subject, tokenizer))
    if kind == "model" and manifest:
        _run(checks, "no quantization leftovers", lambda: check_leftovers(folder, manifest))
    if manifest and subject and manifest.golden:
        _run(checks, "scores", lambda: check_scores(subject, manifest))
    if kind == "adapter" and manifest and subject:
        hold = any(check.name == "golden scores are given again" and check.ok for check in checks)
        _run(checks, "base", lambda: check_base(manifest, base, scores_hold=hold))
    return checks


def _part(checks: list[Check], name: str, read: Callable[[], T]) -> T | None:
    """What `read` returns, or None and a failing check: files under test may be broken in any way."""
    try:
        found = read()
    except Exception as error:
        checks.append(Check(name, False, _said(error)))
        return None
    checks.append(Check(name, True))
    return found


def _run(checks: list[Check], name: str, group: Callable[[], Iterator[Check]]) -> None:
    """Add the group's checks; an error on the way is itself a failing check."""
    try:
        checks.extend(group())  # those made before an error stay
    except Exception as error:
        checks.append(Check(name, False, _said(error)))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


def _adapter(folder: str, base: str | None, trust_remote_code: bool) -> Subject:
    """The adapter on its base, as this project loads it."""
    loaded = RewardModel.load(folder, base=base, trust_remote_code=trust_remote_code)
    peft = loaded.model
    assert isinstance(peft, PeftModel)
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    wanted = set(get_peft_model_state_dict(peft))
    # PEFT saves a copy of an adapted embedding, which a DeepSpeed run does not: it is the base's own
    copies = {name for name in wanted if name.endswith(".base_layer.weight")} - saved
    head = {name: p for name, p in peft.named_parameters() if ".modules_to_save." in name}
    return Subject(peft, head, sorted(wanted - saved - copies), sorted(saved - wanted), loaded.computes_in)


def load_whole(folder: str, trust_remote_code: bool = False) -> Subject:
    """A whole model, as any reader loads it, for its checks.

    A bias of zeros of the head may stand in the files without a place in the model: SGLang wants it there.
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
