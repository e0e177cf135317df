"""Check what single consumers rely on: the text they produce, their arithmetic, and the files written for them."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from qlora_rm.artifacts.allowed import allowed_between_layouts, allowed_drift
from qlora_rm.artifacts.golden import ROUNDED, drift, scores_of
from qlora_rm.artifacts.head_names import HEAD_BIAS
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.artifacts.own_tokenizer import read_tokenizer
from qlora_rm.backbone.load import read_model_config
from qlora_rm.backbone.paths import is_local
from qlora_rm.backbone.precision import DTYPES
from qlora_rm.backbone.rotary import rotates_as_short
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.exporting.common_checks import uncut_items
from qlora_rm.exporting.consumer import WITH_BIAS_IN_SGLANG, Reader
from qlora_rm.exporting.consumer_inputs import is_turns, texts_of
from qlora_rm.exporting.files import head_names, read_tensor, weight_files
from qlora_rm.exporting.transformers4_compat import generic_ids
from qlora_rm.preferences.clock import fixed_date, original
from qlora_rm.verification.checks import Check, Subject


def check_feed(
    reader: Reader, subject: Subject, manifest: Manifest, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Check]:
    """Check that the consumer's ids for the golden texts score the same as the golden token ids."""
    if reader.needs_template and not tokenizer.chat_template:
        yield Check(f"{reader.name}: chat template is there", False, "it scores conversations only")
        return
    if reader.feed is None:
        return
    items = uncut_items(manifest, tokenizer)
    fed = [(item, reader.feed(tokenizer, item)) for item in items]
    otherwise = [replace(item, token_ids=ids) for item, ids in fed if ids is not None and ids != item.token_ids]
    same, left_out = sum(ids == item.token_ids for item, ids in fed), sum(ids is None for _, ids in fed)
    seen = f"{same} of {len(items)} items have the trained ids"
    if left_out:
        seen += f", {left_out} cannot come up there"
    ok = same > 0
    if otherwise:
        pad = manifest.contract.pad_token_id
        moved = drift(otherwise, scores_of(otherwise, lambda ids: subject.score(ids, pad)), ROUNDED)
        ok = moved.ok
        seen += f"; the others: {moved}"
    yield Check(f"{reader.name}: texts are scored as trained", ok, seen if ok else f"{seen}. It is fed {reader.fed}")


def clipping(reader: Reader, manifest: Manifest) -> str | None:
    """Return a warning if scores exceed the range to which the consumer clips, else None."""
    reward, scores = manifest.reward, [abs(score) for item in manifest.expected() for score in item.scores]
    reach = max([0.0, *scores, *([abs(reward.mean) + 3 * reward.std] if reward else [])])
    if reader.clips is None or reach <= reader.clips:
        return None
    return f"{reader.name} clips rewards at {reader.clips:g} by default, and scores here reach {reach:.1f}"


def check_rounding(readers: list[str], subject: Subject, manifest: Manifest, stored: str) -> Iterator[Check]:
    """Check scores in the 16-bit arithmetic of engines: they are finite, and no clear pair changes its order.

    Checks bf16, and also fp16 where the weights are stored in fp32, since vLLM and SGLang choose it then. The model is cast
    in place, so this check runs last. fp16 is cast from bf16 weights, which slightly overstates the differences.
    """
    pad, items = manifest.contract.pad_token_id, manifest.expected()
    for name in ("bf16", "fp16") if stored == "fp32" else (stored,):
        nn.Module.to(subject.model, dtype=DTYPES[name])
        scores = scores_of(items, lambda ids: score_sequences(subject.model, ids, pad_token_id=pad, layout="right"))
        allowed = allowed_drift(manifest, name)
        clear, every = drift(items, scores, allowed), drift(items, scores, replace(allowed, flip_margin=0.0))
        seen = (
            f"largest difference {clear.largest:.2g}; order flips: {every.flips} of {every.pairs} pairs, "
            f"{clear.flips} of the {clear.pairs} with a margin above {allowed.flip_margin:.2g}"
        )
        finite = math.isfinite(clear.largest)
        way_out = "" if finite else "; not finite: merge with --dtype bf16, which is then kept"
        yield Check(f"{', '.join(readers)}: scores in {name}", finite and clear.flips == 0, seen + way_out)


def check_v4(folder: Path, manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> Iterator[Check]:
    """Check that transformers 4 finds the rotary base, and that tokenizer.json alone gives the golden ids."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    nameless = bool(config.get("rope_parameters")) and "rope_theta" not in config
    seen = "it has no names for these rotary parameters, and would rotate with others" if nameless else ""
    yield Check("config says to transformers 4 what it says to 5", not nameless, seen)
    items = uncut_items(manifest, tokenizer)
    right = sum(
        generic_ids(folder, texts_of(tokenizer, item), add_special_tokens=not is_turns(item)) == item.token_ids
        for item in items
    )
    yield Check("tokenizer.json alone gives the golden ids", right == len(items), f"{right} of {len(items)} items")


def check_policy(readers: list[str], tokenizer: PreTrainedTokenizerBase, policy: str) -> Iterator[Check]:
    """Check that the policy has this model's tokens. Consumers that pass on ids cannot translate them."""
    other, names = read_tokenizer(policy), ", ".join(readers)
    yield Check(f"{names}: policy has these tokens", other.get_vocab() == tokenizer.get_vocab(), policy)
    ids, others = ((t.bos_token_id, t.eos_token_id) for t in (tokenizer, other))
    yield Check(f"{names}: policy has these bos and eos", ids == others, f"model {ids}, policy {others}")
    same = original(other.chat_template) == original(tokenizer.chat_template)
    date = fixed_date(tokenizer.chat_template)
    of_today = same and date is not None and fixed_date(other.chat_template) != date
    seen = (
        f"but for the date, {date} in training: give the policy this folder's chat_template.jinja" if of_today else ""
    )
    yield Check(f"{names}: policy has this chat template", same, seen if same else "it would be scored on other turns")


def check_value_model(folder: Path, subject: Subject, manifest: Manifest) -> Iterator[Check]:
    """Check that the token classifier in `value/` gives the scores at last tokens. Reuses the loaded backbone."""
    stock = subject.model
    assert isinstance(stock, PreTrainedModel)
    with torch.device("meta"):
        value = AutoModelForTokenClassification.from_config(AutoConfig.from_pretrained(folder)).eval()
    held = {name for names in weight_files(folder).values() for name in names}
    bias, wanted = read_tensor(folder, HEAD_BIAS), set(value.state_dict())
    whole = wanted == held and bias is not None and not bias.any()
    yield Check("value model has its tensors and a bias of zeros", whole, ", ".join(sorted(wanted ^ held)))
    if not whole or bias is None:
        return
    value.set_submodule(value.base_model_prefix, stock.base_model)
    device = next(stock.parameters()).device
    value.load_state_dict({**stock.state_dict(), HEAD_BIAS: bias.to(device)}, assign=True)
    pad, sequences = manifest.contract.pad_token_id, [ids for item in manifest.golden for ids in item.token_ids]
    with torch.no_grad():
        last = torch.stack([value(torch.tensor([ids], device=device)).logits[0, -1, 0].cpu() for ids in sequences])
    apart = float((last.float() - subject.score(sequences, pad)).abs().max())
    allowed = allowed_between_layouts(manifest, subject.computes_in)
    yield Check(
        "value model scores last tokens as the model", apart <= allowed.absolute, f"largest difference {apart:.2g}"
    )


def check_head_bias(folder: Path, subject: Subject) -> Iterator[Check]:
    """Check that the files hold a zero head bias where SGLang would otherwise leave it random."""
    if type(subject.model).__name__ not in WITH_BIAS_IN_SGLANG:
        return
    bias = read_tensor(folder, HEAD_BIAS)
    yield Check("sglang: head has a bias of zeros", bias is not None and not bias.any())


def check_adapter_files(folder: Path) -> Iterator[Check]:
    """Check what PEFT's Auto class needs beyond the checks of `verify` on an adapter."""
    config = PeftConfig.from_pretrained(str(folder))
    yield Check("peft: task type is SEQ_CLS", config.task_type == "SEQ_CLS", str(config.task_type))
    head, kept = head_names(folder), set(config.to_dict().get("modules_to_save") or ())
    named = bool(head) and all({name, name.rpartition(".")[2]} & kept for name in head)
    yield Check("peft: head is among the saved modules", named, ", ".join(head) or "no head in the file")
    base = str(config.base_model_name_or_path)
    found = Path(base).is_absolute() or not is_local(base)
    yield Check("peft: base is named by hub id or absolute path", found, base if found else f"{base}; pass --base")


def check_rotation(manifest: Manifest, base: str | None, trust_remote_code: bool = False) -> Iterator[Check]:
    """Check that the base's own configuration, which PEFT loads, rotates a single sequence as in training."""
    length = manifest.contract.rotary_length
    if length is None:
        return
    name, revision = base or manifest.base.name_or_path, None if base else manifest.base.revision
    same = rotates_as_short(read_model_config(name, revision, trust_remote_code), length)
    seen = f"every sequence as one of {length} tokens"
    way_out = (
        f"trained with {seen}; the base's own configuration rotates short ones otherwise. Merge it and export that"
    )
    yield Check("peft: base rotates sequences as in training", same, seen if same else way_out)
