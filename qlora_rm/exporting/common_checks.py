"""Check, on one loaded model, the parts of the contract on which every consumer of a full model relies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextClassificationPipeline

from qlora_rm.artifacts.allowed import allowed_between_layouts
from qlora_rm.artifacts.golden import GoldenItem
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.exporting.consumer_inputs import is_turns, texts_of
from qlora_rm.exporting.files import opened, read_tensor
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.tokenization import Tokenization
from qlora_rm.verification.checks import (
    Check,
    Subject,
    check_golden_ids,
    check_leftovers,
    check_scores,
    check_tokenizer,
    check_vocabulary,
    check_weights,
)


def check_whole(folder: str, manifest: Manifest, tokenizer: PreTrainedTokenizerBase, subject: Subject) -> list[Check]:
    """Run all checks that do not depend on the consumer."""
    return [
        *check_tokenizer(manifest, tokenizer),
        *check_golden_ids(manifest, tokenizer),
        *_check_template(manifest, tokenizer),
        *check_weights(subject),
        *check_vocabulary(subject, tokenizer),
        *check_leftovers(folder, manifest),
        *check_scores(subject, manifest),
        *_check_pipeline(subject, manifest, tokenizer),
    ]


def uncut_items(manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> list[GoldenItem]:
    """Return the golden items of text and turns within the trained length. Consumers cut differently, or not at all."""
    items = [item for item in manifest.expected() if isinstance(item.responses[0], str) or is_turns(item)]
    results = Tokenization(tokenizer).tokenize_each([item.candidates() for item in items])
    return [
        item
        for item, result in zip(items, results, strict=True)
        if not isinstance(result, RowFault) and result.tokens.sequences == item.token_ids
    ]


def _check_template(manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> Iterator[Check]:
    """Check that rendering and tokenizing in one call gives the same ids as in two calls."""
    turns = [item for item in uncut_items(manifest, tokenizer) if is_turns(item)]
    wrong = 0
    for item in turns:
        for response, ids in zip(item.responses, item.token_ids, strict=True):
            at_once: Any = tokenizer.apply_chat_template(
                [*item.prompt, *response], tools=item.tools, tokenize=True, return_dict=True, **item.template_kwargs
            )
            wrong += at_once["input_ids"] != ids
    if turns:
        seen = f"{wrong} conversations do not" if wrong else f"{len(turns)} items"
        yield Check("template tokenizes in one call as in two", wrong == 0, seen)


def _check_pipeline(subject: Subject, manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> Iterator[Check]:
    """Check that the text-classification pipeline with default settings gives the raw score, not its sigmoid."""
    items = uncut_items(manifest, tokenizer)
    if not items:
        return
    assert isinstance(subject.model, PreTrainedModel)
    classify: Any = TextClassificationPipeline(model=subject.model, tokenizer=tokenizer)
    distances = [0.0]
    for item in items:
        found = classify(texts_of(tokenizer, item), add_special_tokens=not is_turns(item))
        raw = subject.score(item.token_ids, manifest.contract.pad_token_id, alone=True).tolist()
        distances += [abs(one["score"] - score) for one, score in zip(found, raw, strict=True)]
    allowed = allowed_between_layouts(manifest, subject.computes_in)
    ok = all(distance <= allowed.absolute for distance in distances)  # a NaN is not
    yield Check("pipeline gives the raw score", ok, f"largest difference {max(distances):.2g}")


def check_head_is(folder: Path, adapter: str) -> Iterator[Check]:
    """Check that the head in the files equals the adapter's, cast."""
    with opened(Path(adapter) / "adapter_model.safetensors") as file:
        head = {name: file.get_tensor(name) for name in file.keys() if "lora_" not in name}  # noqa: SIM118
    for key, trained in head.items():
        name = key.removeprefix("base_model.model.")
        held = read_tensor(folder, name)
        same = held is not None and held.shape == trained.shape and torch.equal(trained.to(held.dtype), held)
        yield Check(f"{name} is the adapter's", same, "" if same else f"{adapter} holds another: merge it again")
    if not head:
        yield Check("head is the adapter's", False, f"{adapter} holds no head")
