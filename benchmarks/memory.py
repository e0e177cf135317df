"""python -m benchmarks.memory [NAME ...]

Compare the memory that `qlora_rm.planning` predicts for a training step with a real run of `qlora_rm.train`: NF4 weights, real
adapters, two optimizer steps, fp32 on one CPU thread. Each setting runs in a process forked from one that has only done its
imports. Results go to benchmarks/results/memory_cpu.json, and from there into docs/scale.md.

The measurement is the growth of the resident set over its size after all imports: VmHWM of /proc/self/status, less RssFile.
RssFile counts pages of libraries and of the checkpoint, which belong to files and which the kernel can reclaim. There are two
high-water marks: one of loading and, reset when training begins, one of the two steps. The allocator must return freed memory
(MALLOC_*), or an earlier peak would still be resident in a later one.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.prefix_sharing import peak_memory, reset_peak_memory
from qlora_rm.artifacts.manifest import library_versions
from qlora_rm.backbone.load import read_model_config
from qlora_rm.config import AdapterConfig, BackboneConfig
from qlora_rm.planning.gpus import processors
from qlora_rm.planning.memory import Memory, Setting, memory
from qlora_rm.planning.rehearsal import Batch, Rehearsal
from qlora_rm.planning.skeleton import build, weigh
from qlora_rm.training import run as door
from qlora_rm.training.engine import EngineCheck
from tests.tokenizers_for_tests import small_tokenizer

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory_cpu.json"
GIVES_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama 768x12": {"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12},
    "llama 1536x4, 4 kv heads": {"model_type": "llama", "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4},
    "qwen2 1024x6": {"model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 8},
    "gemma3 1024x6, windows": {"model_type": "gemma3_text", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "sliding_window": 256},
    "gpt2 1024x6": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 6, "n_head": 16},
}  # fmt: skip
VOCABULARY, CONTEXT = 16_000, 4096


@dataclass(frozen=True)
class Run:
    """One setting of a training run. Sequences have `length` tokens, and pairs share `prompt` of them."""

    shape: str
    length: int
    prompt: int
    pairs: int
    checkpointing: bool
    share: bool = True
    lora_r: int = 16
    accumulation: int = 1


RUNS = {
    "short": Run("llama 768x12", 512, 256, 2, False),
    "checkpointed": Run("llama 768x12", 512, 256, 8, True),
    "long": Run("llama 768x12", 1536, 1152, 1, False),
    "padded": Run("llama 1536x4, 4 kv heads", 256, 128, 2, False, share=False),
    "padded, checkpointed": Run("qwen2 1024x6", 512, 256, 4, True, share=False),
    "large adapter": Run("llama 1536x4, 4 kv heads", 256, 192, 2, False, lora_r=128),
    "accumulating": Run("qwen2 1024x6", 512, 384, 2, False, lora_r=64, accumulation=2),
    "long, checkpointed": Run("qwen2 1024x6", 2048, 1536, 1, True, lora_r=8),
    "windows": Run("gemma3 1024x6, windows", 512, 384, 2, False),
    "learned positions": Run("gpt2 1024x6", 512, 256, 2, False),
}


def predict(run: Run, folder: str) -> Memory:
    """Return the plan's terms for this setting."""
    adapter = AdapterConfig(lora_r=run.lora_r)
    model = build(read_model_config(folder), BackboneConfig(), adapter, torch.float32)
    weights = weigh(model, torch.float32)
    if run.share:
        batch = Batch(run.pairs, 2 * run.length - run.prompt, 2 * run.pairs)
    else:
        batch = Batch(2 * run.pairs, run.length, 2 * run.pairs, packed=False)
    step = Rehearsal(model, torch.float32, "sdpa").step(
        batch, checkpointing=run.checkpointing, accumulates=run.accumulation > 1
    )
    setting = Setting("single", 1, run.pairs, run.accumulation, run.checkpointing)
    return memory(weights, step, setting, processors(psutil.virtual_memory().total))


def measure(run: Run, folder: str, rows: str) -> dict[str, float]:
    """Run the training command and return peaks of loading and of training, in MB over what was resident before.

    Call it in a process that has only done its imports.
    """
    before, peaks, begin = reset_peak_memory() - of_files(), {}, EngineCheck.on_train_begin

    def on_train_begin(self: EngineCheck, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        peaks["loading"] = peak_memory() - of_files() - before
        peaks["loaded"] = reset_peak_memory() - of_files() - before

    def finish(*_: Any) -> dict[str, float]:
        peaks["training"] = peak_memory() - of_files() - before
        return {}

    with tempfile.TemporaryDirectory() as out:
        flags = {
            "model_name_or_path": folder, "dataset": rows, "output_dir": out, "max_length": run.length, "bf16": False,
            "per_device_train_batch_size": run.pairs, "gradient_accumulation_steps": run.accumulation, "max_steps": 2,
            "gradient_checkpointing": run.checkpointing, "lora_r": run.lora_r, "share_prefix": str(run.share).lower(),
            "eval_fraction": 0, "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        with patch.object(EngineCheck, "on_train_begin", on_train_begin), patch.object(door, "finish", finish):
            door.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    return peaks


def of_files() -> float:
    """Return the MB of the resident set that are pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssFile"))


def in_a_process_of_its_own(function: Callable[..., T], *args: Any) -> T:
    """Return the result of `function`, run in a forked process, which starts with everything imported."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(function(*args)))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{args} failed; what it said stands above") from None
    finally:
        process.join()


def make_backbone(folder: Path, shape: str) -> str:
    tokenizer = small_tokenizer()
    fields = dict(SHAPES[shape])
    position = {"n_positions": CONTEXT} if fields["model_type"] == "gpt2" else {"max_position_embeddings": CONTEXT}
    config = AutoConfig.for_model(**fields, **position, vocab_size=VOCABULARY, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_rows(path: Path, run: Run) -> str:
    """Write pairs of token ids. In plain batches the rejected response is shorter, so that there is padding."""
    rows = []
    for i in range(2 * run.pairs * run.accumulation):
        prompt = [300 + (i * 7 + k) % 200 for k in range(run.prompt)]
        ending = run.length - run.prompt
        short = ending if run.share else ending - 16
        chosen = prompt + [20 + i] + [310 + k % 90 for k in range(ending - 1)]
        rejected = prompt + [120 + i] + [320 + k % 90 for k in range(short - 1)]
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def check(run: Run) -> dict[str, Any]:
    """Return prediction and measurement, in MB. Call it in a process that has only done its imports."""
    with tempfile.TemporaryDirectory(prefix="qlora_rm_memory_") as scratch:
        folder = in_a_process_of_its_own(make_backbone, Path(scratch) / "backbone", run.shape)
        rows = make_rows(Path(scratch) / "rows.jsonl", run)
        predicted = in_a_process_of_its_own(predict, run, folder)
        measured = in_a_process_of_its_own(measure, run, folder, rows)
    terms = {term: size / 1e6 for term, size in vars(predicted).items()}
    return {"run": asdict(run), "terms": terms, "predicted": predicted.total / 1e6, "measured": measured}


def main(argv: list[str]) -> int:
    names = argv or list(RUNS)
    if unknown := sorted(set(names) - set(RUNS)):
        print(f"error: no run {unknown[0]!r}; there are {', '.join(RUNS)}.", file=sys.stderr)
        return 2
    results: dict[str, Any] = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    for name in names:
        results[name] = result = check(RUNS[name])
        predicted, training = result["predicted"], result["measured"]["training"]
        print(
            f"{name:22} predicted {predicted:6.0f}, measured {training:6.0f} MB: {predicted / training:.3f}", flush=True
        )
        machine = {"machine": f"{os.cpu_count()} CPU cores, no GPU", "versions": library_versions()}
        ordered = {known: results[known] for known in RUNS if known in results}
        RESULTS.write_text(json.dumps({**machine, "runs": ordered}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    settings = GIVES_BACK | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if not settings.items() <= os.environ.items():  # the allocator reads them when a process starts
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]], {**os.environ, **settings}
        )
    sys.exit(main(sys.argv[1:]))
