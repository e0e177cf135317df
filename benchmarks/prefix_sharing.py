"""qlora-rm bench [hh|finegrained|oasst|zh|short|sweep ...]

Compare pairs per second of this trainer with TRL's RewardTrainer, and with itself without sharing. Both sides run in one
process, on the same pairs, with the same 4-bit backbone and LoRA shape, in fp32. Ratios go to benchmarks/results/ as JSON,
and from there into docs/performance.md.

    trl             RewardTrainer at its defaults: random order, gradient checkpointing, padded batches
    trl best        the same grouped by length, without checkpointing
    plain           this trainer, padded batches, without checkpointing
    packed          this trainer, padding removed, nothing shared, without checkpointing
    shared          this trainer, each shared prefix once, without checkpointing
    shared default  the same at its defaults, so with checkpointing
    bare            forward and backward of as many tokens as `shared` holds, as dense causal sequences

`trl best` keeps unused columns, because TRL drops the column of lengths and then cannot group by it.

TRL casts adapters to bf16, which a CPU multiplies slowly. Its runs here keep fp32 adapters, to its advantage.
"""

import ctypes
import gc
import gzip
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from benchmarks.performance_page import write_page
from qlora_rm.artifacts.manifest import library_versions
from qlora_rm.backbone.adapter import attach_adapter
from qlora_rm.backbone.load import load_backbone
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.config import AdapterConfig, BackboneConfig, DataConfig, ObjectiveConfig
from qlora_rm.preferences import Tokenization, forest, load_comparisons
from qlora_rm.training.arguments import TrainingConfig
from qlora_rm.training.objective import Objective
from qlora_rm.training.trainer import PreferenceTrainer, keep_trainables
from tests.real_data import REAL_DATA
from tests.tokenizers_for_tests import tokenizer_of

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results"
MAX_LENGTH = 1024


@dataclass(frozen=True)
class Bench:
    """A backbone on disk, the tokenizer for its rows, and the number of comparisons in a micro-batch."""

    folder: str
    tokenizer: PreTrainedTokenizerBase
    batch: int

    def model(self, share_prefix: str = "true") -> Any:
        """Return a fresh copy of backbone and adapter, with the same weights every time."""
        config = BackboneConfig(model_name_or_path=self.folder, share_prefix=share_prefix)  # type: ignore[arg-type]
        torch.manual_seed(0)
        return attach_adapter(load_backbone(config, self.tokenizer, torch.float32), AdapterConfig())


def make_bench(folder: Path, hidden: int, layers: int, texts: Sequence[str], batch: int) -> Bench:
    """Make a random Llama of width `hidden`. The tokenizer is trained on the rows themselves, with at most 32k entries."""
    tokenizer = tokenizer_of(texts, 32_000)
    shape = {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3 // 64 * 64, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "max_position_embeddings": 8192}
    torch.manual_seed(0)
    config = LlamaConfig(**shape, **heads, vocab_size=32_000, pad_token_id=tokenizer.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Bench(str(folder), tokenizer, batch)


# ---- the sides -------------------------------------------------------------------------------------------------------


def settings(bench: Bench, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": bench.folder, "per_device_train_batch_size": bench.batch, "gradient_accumulation_steps": 1, "num_train_epochs": 1,
        "bf16": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "max_length": None, "eval_strategy": "no",
        "logging_steps": 1000, "learning_rate": 1e-4, "warmup_steps": 0, "dataloader_pin_memory": False, **changes,
    }  # fmt: skip


def trl(bench: Bench, rows: Dataset, **changes: Any) -> Callable[[], None]:
    pairs = [
        {"chosen_ids": s[i], "rejected_ids": s[j], "length": max(len(s[i]), len(s[j]))}
        for row in rows
        for s in [[row["prompt_ids"] + ids for ids in row["response_ids"]]]
        for i, j in row["wins"]
    ]
    model = bench.model("false")
    with keep_trainables(model):
        trainer = RewardTrainer(
            model, RewardConfig(**settings(bench, **changes)), train_dataset=Dataset.from_list(pairs),
            processing_class=bench.tokenizer,
        )  # fmt: skip
    return trainer.train


def ours(bench: Bench, rows: Dataset, share_prefix: str, **changes: Any) -> Callable[[], None]:
    args = TrainingConfig(**settings(bench, **changes))
    objective = Objective(ObjectiveConfig(ties="half"))
    return PreferenceTrainer(bench.model(share_prefix), args, bench.tokenizer, rows, None, objective).train


def packed(bench: Bench, rows: Dataset) -> Callable[[], None]:
    """Prepare a run without padding and without sharing: every sequence is its own tree."""
    train = ours(bench, rows, "true", gradient_checkpointing=False)

    def run() -> None:
        threshold, forest.SHARE_FROM = forest.SHARE_FROM, float("inf")
        try:
            train()
        finally:
            forest.SHARE_FROM = threshold

    return run


def bare(bench: Bench, rows: Dataset) -> Callable[[], None]:
    """Prepare a run over one dense causal sequence per micro-batch, with as many tokens as the micro-batch's forest.

    It has no padding, no sharing, no data and only a trivial loss. Optimizer steps are included.
    """
    model = bench.model("false").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    trainer = PreferenceTrainer(
        bench.model("true"), TrainingConfig(**settings(bench)), bench.tokenizer, rows, None,
        Objective(ObjectiveConfig()),
    )  # fmt: skip
    pad = bench.tokenizer.pad_token_id
    sizes = [int((batch["input_ids"] != pad).sum()) for batch in trainer.get_train_dataloader()]
    batches = [torch.randint(300, 30_000, (1, size), device=model.device) for size in sizes]

    def run() -> None:
        for ids in batches:
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


SIDES: dict[str, Callable[[Bench, Dataset], Callable[[], None]]] = {
    "trl": trl,
    "trl best": lambda b, r: trl(
        b, r, gradient_checkpointing=False, train_sampling_strategy="group_by_length", remove_unused_columns=False
    ),
    "plain": lambda b, r: ours(b, r, "false", gradient_checkpointing=False),
    "packed": packed,
    "shared": lambda b, r: ours(b, r, "true", gradient_checkpointing=False),
    "shared default": lambda b, r: ours(b, r, "true"),
    "bare": bare,
}


def measure(bench: Bench, rows: Dataset, sides: Sequence[str], repeats: int = 1) -> dict[str, Any]:
    """Measure each side's seconds (best of `repeats`, with sides alternating) and peak memory growth, after one warm-up."""
    best: dict[str, dict[str, float]] = {}
    ours(bench, rows.select(range(2)), "true", gradient_checkpointing=False)()
    for _ in range(repeats):
        for side in sides:
            run = SIDES[side](bench, rows)
            before = reset_peak_memory()
            began = time.perf_counter()
            run()
            seconds, grown = time.perf_counter() - began, peak_memory() - before
            if side not in best or seconds < best[side]["seconds"]:
                best[side] = {"seconds": seconds, "peak_mb": grown}
            print(
                f"  {side:15} {seconds:8.2f} s  {len(rows) / seconds:8.3f} comparisons/s  +{grown:,.0f} MB", flush=True
            )
            del run
    return best


def reset_peak_memory() -> float:
    """Reset the high-water mark of the resident set. Return its current size in MB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory freed by an earlier side would hide this side's growth
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> float:
    status = Path("/proc/self/status").read_text()
    kibibytes = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    return kibibytes * 1024 / 1e6


# ---- the data --------------------------------------------------------------------------------------------------------


def real_rows(bench: Bench, name: str, count: int, folder: Path) -> Dataset:
    """Choose `count` comparisons with a winner, seeded. Over-long ones are dropped, as in TRL."""
    config = DataConfig(on_bad_row="skip", over_long="drop")
    dataset, _ = load_comparisons(
        [str(REAL_DATA[name](DATA, folder))], config, Tokenization(bench.tokenizer, MAX_LENGTH, "drop")
    )
    won = [i for i, wins in enumerate(dataset["wins"]) if wins]
    return dataset.select(sorted(random.Random(0).sample(won, min(count, len(won)))))


def made_rows(count: int, length: int, share: float, k: int) -> Dataset:
    """Make comparisons of k responses. Sequences have `length` tokens, of which `share` is prompt. The first response wins."""
    draw, rows = random.Random(0), []
    prompt, ending = int(length * share), length - int(length * share)
    for _ in range(count):
        ids = [[1000 + r, *draw.choices(range(300, 30_000), k=max(ending - 1, 0))] for r in range(k)]
        rows.append({
            "prompt_ids": draw.choices(range(300, 30_000), k=prompt), "response_ids": ids, "wins": [[0, j] for j in range(1, k)],
            "ties": [], "margins": [0.0] * (k - 1), "weight": 1.0, "length": length, "tokens": prompt + k * ending,
        })  # fmt: skip
    return Dataset.from_list(rows)


def score_difference(bench: Bench, rows: Dataset) -> float:
    """Return the largest difference between packed scores and those of a padded batch."""
    model = bench.model("true")
    sequences = [row["prompt_ids"] + ids for row in rows for ids in row["response_ids"]]
    pad = bench.tokenizer.pad_token_id
    scores = [score_sequences(model, sequences, pad_token_id=pad, layout=layout) for layout in ("forest", "right")]
    return float((scores[0] - scores[1]).abs().max())


# ---- the runs --------------------------------------------------------------------------------------------------------

REAL = {
    "hh": ("hh", 32, 8, ["trl", "trl best", "packed", "shared default", "shared", "bare"]),
    "finegrained": ("finegrained", 8, 2, ["plain", "packed", "shared", "bare"]),
    "oasst": ("oasst", 16, 4, ["plain", "packed", "shared"]),
    "zh": ("llamafactory_zh", 16, 4, ["trl best", "packed", "shared"]),
}


def run_real(name: str, scratch: Path) -> dict[str, Any]:
    source, count, batch, sides = REAL[name]
    texts = Path(REAL_DATA[source](DATA, scratch))
    lines = [json.dumps(row, ensure_ascii=False) for row in _texts(texts)]
    bench = make_bench(scratch / f"backbone_{name}", 768, 12, lines, batch)
    rows = real_rows(bench, source, count, scratch)
    print(
        f"{name}: {len(rows)} comparisons, micro-batches of {batch}, Llama 768 x 12, 4 bit, LoRA r=16, fp32", flush=True
    )
    difference = score_difference(bench, rows.select(range(min(8, len(rows)))))
    return summary(rows, measure(bench, rows, sides)) | {"score_difference": difference}


def _texts(path: Path) -> list[Any]:
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def run_short(scratch: Path) -> dict[str, Any]:
    """Measure a case where sharing cannot help: prompts of 4 tokens before responses of 250."""
    bench = make_bench(scratch / "backbone_short", 512, 8, ["short"], 8)
    rows = made_rows(32, 254, 4 / 254, 2)
    print("short prompts: 4 of 254 tokens", flush=True)
    return summary(rows, measure(bench, rows, ["packed", "shared"], repeats=3))


def run_sweep(scratch: Path) -> list[dict[str, Any]]:
    """Measure how the gain grows with the prompt's share, with K, and with length."""
    bench = make_bench(scratch / "backbone_sweep", 256, 4, ["sweep"], 4)
    points = [{"share": s, "k": 2, "length": 512} for s in (0, 0.25, 0.5, 0.75, 0.9, 0.95)]
    points += [{"share": 0.75, "k": k, "length": 512} for k in (4, 8, 16)]
    points += [{"share": 0.75, "k": 2, "length": n} for n in (256, 1024, 2048, 4096)]
    results = []
    for point in points:
        rows = made_rows(16 if point["length"] <= 1024 else 4, **point)
        print(f"prompt share {point['share']:.0%}, K {point['k']}, {point['length']} tokens", flush=True)
        results.append(point | summary(rows, measure(bench, rows, ["plain", "shared"], repeats=2)))
    return results


def summary(rows: Dataset, sides: dict[str, Any]) -> dict[str, Any]:
    shared = sides["shared"]["seconds"]
    total = sum(len(row["prompt_ids"]) * len(row["response_ids"]) + sum(map(len, row["response_ids"])) for row in rows)
    ratios = {side: measured["seconds"] / shared for side, measured in sides.items() if side != "shared"}
    for side, ratio in ratios.items():
        print(f"  shared is {ratio:.2f}x {side}", flush=True)
    return {
        "comparisons": len(rows),
        "tokens": total,
        "distinct_tokens": sum(rows["tokens"]),
        "sides": sides,
        "speedup_over": ratios,
    }


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "versions": library_versions(), "python": platform.python_version()}  # fmt: skip


def main(argv: list[str]) -> int:
    wanted = argv or [*REAL, "short", "sweep"]
    known = {*REAL, "short", "sweep"}
    if unknown := sorted(set(wanted) - known):
        print(f"error: no benchmark {unknown[0]!r}; there are {', '.join(sorted(known))}.", file=sys.stderr)
        return 2
    RESULTS.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="qlora_rm_bench_"))
    try:
        for name in wanted:
            if name in REAL and not DATA.is_dir():
                print(f"{name}: left out, no folder {os.path.relpath(DATA, ROOT)} beside the repository")
                continue
            result = (
                run_short(scratch)
                if name == "short"
                else run_sweep(scratch)
                if name == "sweep"
                else run_real(name, scratch)
            )
            content = {"benchmark": name, "machine": machine(), "result": result}
            (RESULTS / f"prefix_sharing_{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
