"""python -m benchmarks.gpu_check [--cpu] [--only PART ...] [--output FILE] [--seconds N]

Check what only a GPU can show, in one process and under eight minutes. The parts compare packed passes with plain ones, 4-bit
experts with dequantized ones, a resumed run with an uninterrupted one, one artifact on both kinds of device, and the plan's
memory with the allocator's peak. The last part runs the demo's commands. `make test-gpu` runs this and fails if a part fails.

The report is written after every part. Without a GPU nothing runs, unless --cpu requests the same code on small shapes.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.gpu.artefact import artefact
from benchmarks.gpu.demo import demo
from benchmarks.gpu.experts import experts
from benchmarks.gpu.memory import memory
from benchmarks.gpu.packed import packed
from benchmarks.gpu.resume import resume
from benchmarks.gpu.suite import ROOT, Part, Setting, Suite
from qlora_rm.libraries import quiet_libraries

RESULTS = ROOT / "benchmarks" / "results"
BUDGET = 460.0
"""Seconds for all parts. With the imports, they stay under eight minutes."""

PARTS = [
    Part("packed", 130, packed),
    Part("experts", 15, experts),
    Part("resume", 45, resume),
    Part("artefact", 60, artefact),
    Part("memory", 50, memory),
    Part("demo", 160, demo),
]
"""Each part with its seconds on a GPU, estimated from single steps on an H200. The longest part is last."""


def main(argv: list[str] | None = None) -> int:
    """Return 0 if every applicable part passed or there is no GPU to check, and 1 if one failed."""
    quiet_libraries()
    disable_progress_bar()
    options = _options(argv)
    if not options.cpu and not torch.cuda.is_available():
        print("skipped: no GPU here. --cpu runs the same code on small shapes.")
        return 0
    chosen = [part for part in PARTS if not options.only or part.name in options.only]
    output = options.output or RESULTS / ("gpu_check_cpu.json" if options.cpu else "gpu_check.json")
    with tempfile.TemporaryDirectory(prefix="qlora_rm_gpu_") as scratch:
        setting = Setting("cpu" if options.cpu else "cuda", Path(scratch), small=options.cpu or options.small)
        passed = Suite(setting, output, options.seconds).run(chosen)
    print(output)
    return 0 if passed else 1


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description="What only a GPU can show.")
    parser.add_argument("--cpu", action="store_true", help="Run the same code on the CPU, on small shapes.")
    parser.add_argument("--small", action="store_true", help="Small shapes on the GPU too.")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="Run these parts alone.")
    parser.add_argument("--output", type=Path, help="The report; default: benchmarks/results/gpu_check.json.")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="Budget of the run. Default: %(default)s.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
