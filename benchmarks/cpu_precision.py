"""python -m benchmarks.cpu_precision [--comparisons 16]

Time the same training steps on this CPU in fp32, the default, and in bf16 (`--bf16 true`). Rows are real HH-RLHF rows, or
generated ones where there are none. The model is a random Llama of 109 M weights in NF4 with LoRA r=16, prompts shared, no
checkpointing, micro-batches of 8. Both sides run alternately in one process, and the best run of each side counts. The result
goes to benchmarks/results/cpu_precision.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks.prefix_sharing import DATA, RESULTS, Bench, machine, made_rows, make_bench, real_rows, settings
from qlora_rm.backbone.adapter import attach_adapter
from qlora_rm.backbone.load import load_backbone
from qlora_rm.backbone.precision import DTYPES
from qlora_rm.config import AdapterConfig, BackboneConfig, ObjectiveConfig
from qlora_rm.training.arguments import TrainingConfig
from qlora_rm.training.objective import Objective
from qlora_rm.training.trainer import PreferenceTrainer

UNITS = ("amx_bf16", "avx512_bf16")
"""Names of bf16 units in /proc/cpuinfo."""


def seconds(bench: Bench, rows: Dataset, precision: str) -> float:
    """Time one epoch over `rows`, without loading."""
    torch.manual_seed(0)
    config = BackboneConfig(model_name_or_path=bench.folder)
    model = attach_adapter(load_backbone(config, bench.tokenizer, DTYPES[precision]), AdapterConfig())
    args = TrainingConfig(**settings(bench, bf16=precision == "bf16", gradient_checkpointing=False))
    trainer = PreferenceTrainer(model, args, bench.tokenizer, rows, None, Objective(ObjectiveConfig(ties="half")))
    began = time.perf_counter()
    trainer.train()
    return time.perf_counter() - began


def run(comparisons: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="qlora_rm_bench_") as scratch:
        folder = Path(scratch)
        bench = make_bench(folder / "backbone", 768, 12, ["cpu precision"], 8)
        rows = real_rows(bench, "hh", comparisons, folder) if DATA.is_dir() else made_rows(comparisons, 160, 0.5, 2)
        times: dict[str, list[float]] = {"fp32": [], "bf16": []}
        for _ in range(rounds):
            for precision, taken in times.items():
                taken.append(seconds(bench, rows, precision))
                print(f"  {precision}  {taken[-1]:7.2f} s", flush=True)
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    return {
        "comparisons": comparisons,
        "rows": "hh" if DATA.is_dir() else "generated",
        "distinct_tokens": sum(rows["tokens"]),
        "seconds": times,
        "bf16_speedup": min(times["fp32"]) / min(times["bf16"]),
        "bf16_units": [unit for unit in UNITS if unit in flags],
        **machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=16, help="Rows to train on, once. [16]")
    parser.add_argument("--rounds", type=int, default=2, help="Runs of each side. [2]")
    options = parser.parse_args()
    result = run(options.comparisons, options.rounds)
    print(f"bf16 is {result['bf16_speedup']:.2f} times as fast as fp32; units: {result['bf16_units'] or 'none'}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "cpu_precision.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
