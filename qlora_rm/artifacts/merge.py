"""One stock model from an adapter and its base: dequantize, add in fp32, cast, and prove the scores."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer

from qlora_rm.artifacts.golden import GoldenItem, drift, make_golden, scores_of, tolerance
from qlora_rm.artifacts.load import RewardModel, artefact_kind, load_stock
from qlora_rm.artifacts.manifest import Manifest, Merge
from qlora_rm.backbone.adapter import load_adapter
from qlora_rm.backbone.experts import unpack_experts
from qlora_rm.backbone.head import head_modules
from qlora_rm.backbone.load import Backbone
from qlora_rm.backbone.precision import DTYPES, NAMES
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.errors import UserError

MergeDtype = Literal["bf16", "fp32"]
METHOD = "base dequantized, adapter added in fp32, cast"


def merge(
    folder: str, output: str, *, dtype: MergeDtype = "bf16", base: str | None = None, trust_remote_code: bool = False
) -> Merge:
    """Write to `output` the model that `folder`'s adapter and its base make together.

    The base is the quantized one the adapter was trained on: added to the original weights, an adapter gives other
    scores. The result loads by transformers' Auto classes, holds tokenizer, template and manifest, and is renamed
    into place only after its scores, read back from disk, stand within the tolerance of the golden ones.

    Raises:
        UserError: `folder` holds no adapter or no longer gives its own golden scores, `output` is not free, the disk
            too full, or the merged scores drift; nothing is left behind then.
    """
    if artefact_kind(folder) != "adapter":
        raise UserError(f"{folder} already is one whole model: there is nothing to merge.")
    with new_folder(output) as beside:
        adapted = RewardModel.load(folder, base=base, trust_remote_code=trust_remote_code)
        manifest, tokenizer = adapted.manifest, adapted.tokenizer
        assert manifest is not None
        golden = manifest.golden or make_golden([], adapted.tokenization, adapted.score_token_ids)
        _require_own_scores(folder, adapted, golden)
        model = _merged(adapted, folder)
        del adapted
        _save(model, beside, dtype)
        tokenizer.save_pretrained(beside)
        del model
        record = _prove(beside, manifest, golden, dtype, tokenizer.pad_token_id, trust_remote_code)
        replace(manifest, golden=golden, merge=record).save(beside)
    return record


@contextmanager
def new_folder(output: str) -> Iterator[Path]:
    """A folder beside `output` that becomes `output` at the end, or vanishes with any error.

    Raises:
        UserError: `output` exists and is not an empty folder, or cannot be made.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder. Choose another --output, or remove it.")
    beside = target.absolute().with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}.") from error
    try:
        yield beside
        beside.rename(target.absolute())
    except BaseException:
        shutil.rmtree(beside)
        raise


def dequantize(model: PreTrainedModel) -> None:
    """Make a quantized model one of plain fp32 layers on the CPU, in place, layer by layer.

    Unlike `PreTrainedModel.dequantize` (transformers 5.23) it needs no room on the GPU, and gives GPT-2 its Conv1D
    back, whose weights would otherwise be saved transposed.
    """
    quantizer: HfQuantizer | None = getattr(model, "hf_quantizer", None)
    for name, module in list(model.named_modules()):
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            model.set_submodule(name, _plain_layer(module))
    unpack_experts(model)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    nn.Module.to(model, device="cpu", dtype=torch.float32)


def _plain_layer(module: Any) -> nn.Module:
    weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).float().cpu()
    rows, columns = weight.shape
    is_conv = getattr(module, "source_cls", None) is Conv1D
    with torch.device("meta"):
        plain: Any = Conv1D(rows, columns) if is_conv else nn.Linear(columns, rows, bias=module.bias is not None)
    plain.weight = nn.Parameter(weight.T.contiguous() if is_conv else weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().float().cpu(), requires_grad=False)
    return plain


def _require_own_scores(folder: str, adapted: RewardModel, golden: list[GoldenItem]) -> None:
    """The adapter, loaded here, gives its golden scores; otherwise its base is another one."""
    manifest = adapted.manifest
    assert manifest is not None
    allowed = tolerance(manifest.compute_dtype, adapted.computes_in, manifest.quantization)
    moved = drift(golden, scores_of(golden, adapted.score_token_ids), allowed)
    if not moved.ok:
        raise UserError(
            f"The adapter {folder} does not give its golden scores on this base ({moved}; allowed {allowed}). Its base "
            "has changed: pass --base with the one it was trained on."
        )


def _merged(adapted: RewardModel, folder: str) -> PreTrainedModel:
    """The whole model in fp32 on the CPU, its trained head in place."""
    peft = adapted.model
    assert isinstance(peft, PeftModel)
    base: PreTrainedModel = peft.unload()
    dequantize(base)
    again = load_adapter(Backbone(base, head_modules(base), has_new_head=False), folder, trainable=False)
    try:
        return again.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"The adapter {folder} cannot be merged: {error}") from error


def _save(model: PreTrainedModel, folder: Path, dtype: MergeDtype) -> None:
    """Cast and save as a stock classifier of one label, which pipelines and vLLM do not squash to (0, 1)."""
    nn.Module.to(model, dtype=DTYPES[dtype])
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(folder).free
    if needed * 1.05 > free:
        raise UserError(f"The merged model takes {needed / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f} GB free.")
    model.config.problem_type = "regression"
    model.config.id2label, model.config.label2id = {0: "score"}, {"score": 0}
    model.save_pretrained(folder)


def _prove(
    folder: Path, manifest: Manifest, golden: list[GoldenItem], dtype: MergeDtype, pad: int, trust_remote_code: bool
) -> Merge:
    """Read the merged model back as any reader would and compare its golden scores."""
    stock, _ = load_stock(str(folder), trust_remote_code)
    computed_in = NAMES[stock.dtype]
    allowed = tolerance(manifest.compute_dtype, manifest.quantization, dtype, computed_in)
    moved = drift(golden, scores_of(golden, lambda ids: score_sequences(stock, ids, pad_token_id=pad)), allowed)
    if not moved.ok:
        raise UserError(
            f"The merged model's scores drift from the golden ones ({moved}; allowed {allowed}); it was not kept. "
            + _way_out(manifest.quantization, dtype)
        )
    return Merge(METHOD, dtype, computed_in, moved.largest)


def _way_out(quantization: str, dtype: MergeDtype) -> str:
    if quantization == "8bit":
        return "LLM.int8() rounds activations too, which no merged model does: use the adapter on its 8-bit base."
    return "Merge with --dtype fp32." if dtype == "bf16" else "Use the adapter on its base instead."
