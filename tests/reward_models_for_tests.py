"""Untrained reward models in the form that training writes, with random adapters and heads that change the scores."""

import json
import shutil
import tempfile
from atexit import register
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from qlora_rm.artifacts.golden import make_golden
from qlora_rm.artifacts.hashes import hash_files
from qlora_rm.artifacts.manifest import FILE_NAME, Base, Manifest, Reward, Training, make_contract
from qlora_rm.artifacts.manifest_versions import SINCE, content_hash
from qlora_rm.artifacts.noise import measure_noise
from qlora_rm.backbone.adapter import attach_adapter
from qlora_rm.backbone.load import load_backbone
from qlora_rm.backbone.precision import DTYPES
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.config import AdapterConfig, BackboneConfig, Quantization
from qlora_rm.preferences import Candidates, Tokenization
from tests.models_for_tests import save_backbone
from tests.tokenizers_for_tests import small_tokenizer, word_piece_tokenizer

HELD_OUT = [
    Candidates(
        [{"role": "user", "content": "What is the capital of France?"}],
        tuple([{"role": "assistant", "content": answer}] for answer in ("Paris.", "I do not know.", "The dog.")),
    ),
    Candidates(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Boil an egg?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "How long?"},
        ],
        tuple([{"role": "assistant", "content": answer}] for answer in ("Eight minutes.", "Ask the fox.")),
    ),
]
HELD_OUT_TEXT = [Candidates("What is the capital of France? ", ("Paris.", "I do not know."))]


def make_reward_model(
    folder: Path,
    architecture: str = "llama",
    *,
    quantization: Quantization = "4bit",
    adapter: AdapterConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rows: int | None = None,
    max_length: int | None = 256,
    golden: bool = True,
    compute: str = "fp32",
    save_again: Callable[[str], None] | None = None,
    backbone: str | None = None,
) -> Path:
    """Write `folder/base` and `folder/model`, an adapter on it (a full model for `AdapterConfig(use_lora=False)`).

    Arguments:
        save_again: rewrites the base in its folder, in another form.
        backbone: a folder to use as base instead of writing one.
    """
    adapter = adapter or AdapterConfig(lora_r=8, lora_alpha=16)
    tokenizer = tokenizer or (word_piece_tokenizer() if architecture == "distilbert" else small_tokenizer())
    base = backbone or save_backbone(folder / "base", architecture, tokenizer, rows=rows)
    output = folder / "model"
    if save_again is not None:
        save_again(base)
    config = BackboneConfig(model_name_or_path=base, quantization=quantization)
    loaded = load_backbone(config, tokenizer, DTYPES[compute], full_fine_tuning=not adapter.use_lora)
    model = attach_adapter(loaded, adapter) if adapter.use_lora else loaded.model
    _pretend_to_train(model)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    tokenization = Tokenization(tokenizer, max_length)
    held_out = HELD_OUT if tokenizer.chat_template else HELD_OUT_TEXT
    score = partial(score_sequences, model, pad_token_id=tokenizer.pad_token_id, autocast=DTYPES[compute])
    items = make_golden(held_out, tokenization, score) if golden else []
    Manifest(
        contract=make_contract(tokenizer, tokenization),
        base=Base.of(base),
        quantization=quantization,
        compute_dtype=compute,
        training=Training(50, {"objective": "bradley_terry"}, "abc", {"rows": {"toy": 4}}),
        reward=Reward(0.5, 1.5, 4),
        golden=items,
        noise=measure_noise(model, items, tokenizer.pad_token_id, DTYPES[compute]),
    ).save(output)
    return output


def _pretend_to_train(model: torch.nn.Module) -> None:
    """Set random LoRA B weights (so that the adapter changes the scores), head and DoRA magnitudes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_B" in name or "lora_embedding" in name or "score" in name or "classifier" in name:
            parameter.data.copy_(noise * (0.1 if "lora_" in name else 0.5))
        elif "magnitude" in name:
            parameter.data.mul_(1 + 0.05 * noise)


@cache
def _llama(compute: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="qlora_rm_test_"))
    register(shutil.rmtree, folder, ignore_errors=True)
    return make_reward_model(folder, compute=compute)


def llama_adapter(compute: str = "fp32") -> Path:
    """Return a 4-bit Llama's adapter folder, made once per test session; to change it, use `copy_of`."""
    return _llama(compute)


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; for a manifest, also update its own hash, as in a deliberate edit."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    if "content_sha256" in content:
        content["content_sha256"] = content_hash(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def seal_again(folder: Path) -> None:
    """Update the manifest's hashes to the folder's current content, as a careful forger would."""
    edit_json(folder / FILE_NAME, files=hash_files(folder))


def as_version_1(folder: Path) -> None:
    """Convert a manifest to version 1: no hashes, no noise, no history."""
    path = folder / FILE_NAME
    content = json.loads(path.read_text(encoding="utf-8")) | {"schema_version": 1}
    for added in SINCE.values():
        for name, keys in added.items():
            holder = content if not name else content[name] or {}
            for key in keys:
                holder.pop(key, None)
    path.write_text(json.dumps(content), encoding="utf-8")
