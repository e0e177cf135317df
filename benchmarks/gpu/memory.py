"""Compare the memory that `plan` predicts for a training step on this GPU with the allocator's peak."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.models import tokenizer
from benchmarks.gpu.passes import free
from benchmarks.gpu.suite import Finding, Setting, Skipped
from qlora_rm.backbone.adapter import attach_adapter
from qlora_rm.backbone.load import load_backbone, read_model_config
from qlora_rm.config import AdapterConfig, BackboneConfig, ObjectiveConfig
from qlora_rm.planning.fit_check import card_at_hand
from qlora_rm.planning.memory import Setting as Planned
from qlora_rm.planning.planner import Planner
from qlora_rm.planning.workload import Workload
from qlora_rm.training.arguments import TrainingConfig
from qlora_rm.training.objective import Objective
from qlora_rm.training.trainer import PreferenceTrainer

SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 4096, "vocab_size": 16_000,
}  # fmt: skip
LENGTH, PROMPT = 1024, 512
PAIRS = (4, 12)
UNDER, OVER = 0.95, 1.2
"""Bounds of predicted / measured. Too low a prediction lets a run fail; too high a prediction wastes the GPU."""
REPORTED_ONLY = "not checkpointed: predicted too high by a known fault, so that only a prediction too low fails"


def memory(setting: Setting, finding: Finding) -> None:
    """Measure peaks of two training steps, checkpointed and not, for two micro-batches. From those, compute MB per token."""
    finding.tolerance = f"predicted / measured from {UNDER:g} to {OVER:g}; {REPORTED_ONLY}"
    if not setting.on_gpu:
        raise Skipped("`python -m benchmarks.memory` holds the plan against the memory of a CPU process")
    folder = make_backbone(setting)
    planner = plan(folder)
    for checkpointing in (True, False):
        points = []
        for pairs in PAIRS:
            predicted, measured = predict(planner, pairs, checkpointing), measure(folder, pairs, checkpointing)
            points.append({"pairs": pairs, "tokens": tokens(pairs), "predicted_mb": predicted, "measured_mb": measured})
            ratio = predicted / measured
            points[-1]["predicted / measured"] = ratio
            finding.require(ratio >= UNDER, f"{pairs} pairs, checkpointing {checkpointing}: {ratio:.3f} of the peak")
            if checkpointing:
                finding.require(ratio <= OVER, f"{pairs} pairs, checkpointed: {ratio:.3f} times the peak")
        few, many = points
        finding.result["checkpointed" if checkpointing else "not checkpointed"] = {
            "runs": points,
            "mb_a_token": {
                side: (many[f"{side}_mb"] - few[f"{side}_mb"]) / (many["tokens"] - few["tokens"])
                for side in ("predicted", "measured")
            },
        }


def make_backbone(setting: Setting) -> str:
    folder = setting.scratch / "middle"
    words = tokenizer(setting)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=words.pad_token_id)).to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def plan(folder: str) -> Planner:
    return Planner(
        read_model_config(folder),
        BackboneConfig(model_name_or_path=folder),
        AdapterConfig(),
        torch.bfloat16,
        partial(Workload.measured, rows(max(PAIRS))),
        cuda=True,
    )


def predict(planner: Planner, pairs: int, checkpointing: bool) -> float:
    """Predict the MB that the allocator hands out, without the CUDA context and fragmentation."""
    terms = planner.memory(Planned("single", 1, pairs, 1, checkpointing), card_at_hand(1))
    return (terms.total - terms.runtime) / 1e6


def measure(folder: str, pairs: int, checkpointing: bool) -> float:
    """Return the allocator's peak in MB over two steps of the trainer. The first step also probes and compiles."""
    free()
    before = torch.cuda.memory_allocated()
    words = AutoTokenizer.from_pretrained(folder)
    backbone = load_backbone(BackboneConfig(model_name_or_path=folder), words, torch.bfloat16)
    arguments = TrainingConfig(
        output_dir=str(Path(folder).with_name("measured")), per_device_train_batch_size=pairs, max_steps=2,
        gradient_accumulation_steps=1, bf16=True, gradient_checkpointing=checkpointing, save_strategy="no",
        eval_strategy="no", report_to="none", disable_tqdm=True, max_length=None,
    )  # fmt: skip
    trainer = PreferenceTrainer(
        attach_adapter(backbone, AdapterConfig()), arguments, words, rows(2 * pairs), None, Objective(ObjectiveConfig())
    )
    free()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def rows(count: int) -> Dataset:
    """Make pairs of the full length. Their first tokens differ, so that comparisons share nothing."""
    made: list[dict[str, Any]] = []
    for i in range(count):
        draw = torch.Generator().manual_seed(i)
        ids = torch.randint(300, 15_000, (2 * LENGTH - PROMPT,), generator=draw).tolist()
        prompt, chosen, rejected = [100 + i, *ids[1:PROMPT]], [20, *ids[PROMPT + 1 : LENGTH]], [21, *ids[LENGTH + 1 :]]
        made.append({
            "prompt_ids": prompt, "response_ids": [chosen, rejected], "wins": [[0, 1]], "ties": [], "margins": [0.0],
            "weight": 1.0, "length": LENGTH, "tokens": tokens(1),
        })  # fmt: skip
    return Dataset.from_list(made)


def tokens(pairs: int) -> int:
    """Return the number of distinct tokens of `pairs` pairs."""
    return pairs * (2 * LENGTH - PROMPT)
