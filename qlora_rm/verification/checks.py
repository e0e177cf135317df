"""Checks that a reward model on disk is the one that was trained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlora_rm.artifacts.allowed import allowed_between_layouts, allowed_drift
from qlora_rm.artifacts.as_written import NO_HASHES, config_changes, file_changes
from qlora_rm.artifacts.golden import GoldenItem, Tolerance, drift, scores_of
from qlora_rm.artifacts.manifest import SCORE_POSITION, Manifest, has_trained_template
from qlora_rm.artifacts.own_tokenizer import tokenization_of
from qlora_rm.backbone.json_files import read_json
from qlora_rm.backbone.layouts import SCORE_POSITIONS, layouts_of, score_position
from qlora_rm.backbone.load import embedding_rows
from qlora_rm.backbone.precision import DTYPES
from qlora_rm.backbone.scoring import TOKENS_PER_BATCH, Layout, score_sequences
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.tokenization import EOS_RULE

RESTORE = "restore it from the training run's output"


@dataclass(frozen=True)
class Check:
    """One condition, whether it holds, and what was found or what to do.

    Attributes:
        checked: False if the check could not run and shows nothing about the model; `ok` is False then.
    """

    name: str
    ok: bool
    detail: str = ""
    checked: bool = True


@dataclass(frozen=True)
class Subject:
    """A loaded model under test.

    Attributes:
        head: the trained score head's parameters by name, with the last layer at the end.
        missing, unread: tensors that the files lack, and tensors in the files that the model has no place for.
        computes_in: name of the dtype of the arithmetic.
    """

    model: nn.Module
    head: Mapping[str, Tensor]
    missing: list[str]
    unread: list[str]
    computes_in: str

    def score(self, sequences: list[list[int]], pad: int, layout: Layout = "right", alone: bool = False) -> Tensor:
        """Scores [S], in batches or each sequence alone."""
        return score_sequences(
            self.model,
            sequences,
            pad_token_id=pad,
            autocast=DTYPES[self.computes_in],
            tokens_per_batch=1 if alone else TOKENS_PER_BATCH,
            layout=layout,
        )


def check_tokenizer(manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> Iterator[Check]:
    """Check that special tokens and chat template are those of the contract."""
    contract, pad, eos = manifest.contract, tokenizer.pad_token_id, tokenizer.eos_token_id
    same = pad is not None and pad == contract.pad_token_id
    seen = f"tokenizer {pad}, manifest {contract.pad_token_id}"
    yield Check("pad token is the trained one", same, seen if same else f"{seen}; {RESTORE}")
    yield Check("pad token is not eos", pad is not None and pad != eos, f"pad {pad}, eos {eos}")
    same = (tokenizer.bos_token_id, eos) == (contract.bos_token_id, contract.eos_token_id)
    seen = f"tokenizer {tokenizer.bos_token_id}, {eos}, manifest {contract.bos_token_id}, {contract.eos_token_id}"
    yield Check("bos and eos are the trained ones", same, seen if same else f"{seen}; {RESTORE}")
    same = contract.eos_rule == EOS_RULE and contract.score_position in SCORE_POSITIONS
    other = f"trained as: {contract.eos_rule}; scored at the {contract.score_position}. Use the qlora_rm that wrote it"
    yield Check("eos rule and score position are this version's", same, "" if same else other)
    same = has_trained_template(tokenizer, contract)
    yield Check("chat template is the trained one", same, "" if same else f"its text has changed; {RESTORE}")


def check_golden_ids(manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> Iterator[Check]:
    """Check that the golden texts give the golden token ids. A changed chat template, a program, is not rendered."""
    items, pad = manifest.golden, manifest.contract.pad_token_id
    unfinished = "none: a checkpoint of an unfinished run has none; finish the run and verify its output"
    yield Check("golden items are there", bool(items), str(len(items)) if items else unfinished)
    padded = sum(pad in ids for item in items for ids in item.token_ids)
    yield Check("no pad token in golden ids", padded == 0, f"{padded} sequences hold it" if padded else "")
    name = "golden texts give the golden token ids"
    if not has_trained_template(tokenizer, manifest.contract):
        yield Check(name, False, f"not tried: tokenizer or template have changed; {RESTORE}")
        return
    results = tokenization_of(manifest, tokenizer).tokenize_each([item.candidates() for item in items])
    wrong = [
        place
        for place, (item, result) in enumerate(zip(items, results, strict=True), start=1)
        if isinstance(result, RowFault) or result.tokens.sequences != item.token_ids
    ]
    seen = f"{len(items) - len(wrong)} of {len(items)} items"
    changed = f"{seen}, item {wrong[0]} does not: tokenizer or template have changed; {RESTORE}" if wrong else seen
    yield Check(name, not wrong, changed)


def check_weights(subject: Subject) -> Iterator[Check]:
    """Check that the head is trained with one label, weights are finite, and files and model hold the same tensors."""
    matrices = {name: p for name, p in subject.head.items() if p.dim() >= 2}
    rows = [len(p) for p in matrices.values()][-1:]
    one = rows == [1]
    yield Check("score head has one label", one, ", ".join(subject.head) if one else f"rows: {rows or 'no head'}")
    broken = [name for name, p in subject.model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    yield Check("weights are finite", not broken, _listed(broken, f"every score may be NaN; {RESTORE}"))
    zero = [name for name, p in matrices.items() if not p.any()]
    yield Check("score head is not zero", not zero, _listed(zero, f"every score would be the same; {RESTORE}"))
    yield Check("no tensor is missing", not subject.missing, _listed(subject.missing, f"random then; {RESTORE}"))
    yield Check("no tensor is unread", not subject.unread, _listed(subject.unread, "they belong to another model"))


def _listed(names: list[str], consequence: str) -> str:
    return f"{len(names)}, first {names[0]}: {consequence}" if names else ""


def check_vocabulary(subject: Subject, tokenizer: PreTrainedTokenizerBase) -> Iterator[Check]:
    """Check that every token has an embedding row, and that model and tokenizer agree on the pad id."""
    model: Any = subject.model.get_base_model() if isinstance(subject.model, PeftModel) else subject.model
    pad, rows = tokenizer.pad_token_id, embedding_rows(model)
    fits = pad is not None and pad < rows and len(tokenizer) <= rows
    yield Check("tokens have embedding rows", fits, f"{len(tokenizer)} tokens, {rows} rows")
    configured = model.config.get_text_config().pad_token_id
    yield Check("model pads as the tokenizer does", configured == pad, f"model {configured}, tokenizer {pad}")


def check_score_position(subject: Subject, manifest: Manifest) -> Iterator[Check]:
    """Check that the score is read at the tokens that the contract names."""
    recorded, found = manifest.contract.score_position, score_position(subject.model)
    name, seen = "score is read where the contract says", found
    if recorded != found and recorded == SCORE_POSITION:  # an earlier version wrote this for every model
        yield Check(name, True, f"{seen}; the contract has an earlier version's words for every model, {recorded}")
        return
    yield Check(name, recorded == found, seen if recorded == found else f"{seen}, contract: {recorded}; {RESTORE}")


def check_leftovers(folder: str, manifest: Manifest) -> Iterator[Check]:
    """Check that a complete model holds plain floating-point weights and its config requests no quantization.

    A model that was quantized on purpose is exempt.
    """
    if any(step.name == "requantize" for step in manifest.history):
        return
    config = read_json(Path(folder) / "config.json", f"{RESTORE.capitalize()}.", strict=False)
    found = ["quantization_config in config.json"] if "quantization_config" in config else []
    for path in sorted(Path(folder).glob("[!.]*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                if file.get_slice(name).get_dtype() in ("U8", "I8") or "lora_" in name:
                    found.append(name)
    yield Check("no quantization leftovers", not found, _listed(found, "merge the adapter again"))


def check_files(folder: str, manifest: Manifest) -> Iterator[Check]:
    """Check that everything a consumer loads is, bit for bit, as it was when the manifest was written."""
    name = "files are those that were written"
    if manifest.schema_version <= NO_HASHES:
        yield Check(name, True, "not tried: schema version 1 holds no hashes of them")
        return
    changes = file_changes(folder, manifest)
    kept = f"{len(manifest.files)} files"
    yield Check(name, not changes, _listed(changes, RESTORE) if changes else kept)


def check_configuration(folder: str, manifest: Manifest) -> Iterator[Check]:
    """Check that what consumers read from config.json or adapter_config.json agrees with the manifest."""
    changes = config_changes(folder, manifest)
    yield Check("configuration is the manifest's", not changes, _listed(changes, RESTORE))


def check_base(manifest: Manifest, base: str | None, *, scores_hold: bool) -> Iterator[Check]:
    """Check that the base is the one the adapter was trained on; a changed base passes if all scores are the same."""
    changes = manifest.base.changes(base)
    found = f"{' and '.join(changes)} changed since training" if changes else ""
    way_out = "its scores hold all the same" if scores_hold else "pass --base with the one it was trained on"
    yield Check("base is the trained one", not changes or scores_hold, f"{found}; {way_out}" if changes else "")


def check_scores(subject: Subject, manifest: Manifest) -> Iterator[Check]:
    """Check that the model reproduces the golden scores, whatever the batch, the padding and the order."""
    items, pad = manifest.expected(), manifest.contract.pad_token_id
    allowed = allowed_drift(manifest, subject.computes_in)
    moved = drift(items, scores_of(items, lambda ids: subject.score(ids, pad)), allowed)
    yield Check("golden scores are given again", moved.ok, f"{moved}; allowed {allowed}")
    yield from check_score_position(subject, manifest)
    yield from _check_batches(subject, items, pad, allowed_between_layouts(manifest, subject.computes_in))
    yield _check_swap(subject, items, pad)


def _check_batches(subject: Subject, items: list[GoldenItem], pad: int, allowed: Tolerance) -> Iterator[Check]:
    sequences = [ids for item in items for ids in item.token_ids]
    alone = subject.score(sequences, pad, alone=True)
    limits = torch.tensor([allowed.of(score) for score in alone.tolist()])
    sides: tuple[Layout, ...] = ("right", "left")
    for side in sides:
        name = f"batch scores equal single scores, {side} padded"
        if side not in layouts_of(subject.model):
            yield Check(name, True, "not tried: this architecture is padded on the right only")
            continue
        difference = (subject.score(sequences, pad, side) - alone).abs()
        ok = bool(torch.all(difference <= limits))
        yield Check(name, ok, f"largest difference {difference.max():.2g}; allowed {allowed}")


def _check_swap(subject: Subject, items: list[GoldenItem], pad: int) -> Check:
    """Check that swapped responses keep their scores, so that every margin changes its sign."""
    backwards = [GoldenItem(i.prompt, i.responses[::-1], i.token_ids[::-1], i.scores[::-1]) for i in items]
    ahead, behind = (scores_of(order, lambda ids: subject.score(ids, pad)) for order in (items, backwards))
    margins = [a - b for scores in ahead for a, b in combinations(scores, 2)]
    swapped = [b - a for scores in behind for a, b in combinations(scores[::-1], 2)]
    clear = [(margin, other) for margin, other in zip(margins, swapped, strict=True) if not abs(margin) <= 1e-3]
    reversed_ = sum(margin * other < 0 for margin, other in clear)
    name = "preferences reverse when responses are swapped"
    return Check(name, reversed_ == len(clear), f"{reversed_} of {len(clear)} pairs")
