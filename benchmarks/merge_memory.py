"""Measure peak memory and speed of a merge, on backbones of 2 GB and 6 GB made on the spot.

    python -m benchmarks.merge_memory            both, into benchmarks/results/merge_memory.json
    python -m benchmarks.merge_memory --layers 1 one of your own depth, printed

The shapes are a 7B Llama's in bf16, at 4 and 14 layers. The adapter is LoRA r=16 on all linear layers. Each merge is a separate
process: it quantizes every linear layer to NF4 with double quantization and dequantizes it, adds the adapter in fp32, and writes
and syncs bf16. It is compared with `cp` of the base's files, also synced. Peak memory is VmHWM, Linux' mark of the most resident
memory, including libraries. The proof of the scores needs a forward pass and is not included.

Just before each side begins, a file of the base's size is written and deleted. A virtual machine returns memory that was free for
some seconds to its host, and every page of it faults to the host when it is written again. On one such machine, the same `cp`
took 1.0 s on memory just freed and 5.4 s on memory free for longer.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from qlora_rm.artifacts.safetensors_writer import Shards, Wanted
from qlora_rm.backbone.safetensors_reader import Checkpoint, model_files, size_of
from qlora_rm.merging.stream import Source, Stream

LAYERS = (4, 14)
ROUNDS = 3
RESULT = Path("benchmarks/results/merge_memory.json")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def shape(layers: int, **more: int) -> LlamaConfig:
    seven_b = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
    return LlamaConfig(num_hidden_layers=layers, **seven_b | more)


def make(folder: Path, layers: int) -> None:
    """Write a base with random weights to `folder/base`, and an adapter with a head to `folder/adapter`."""
    config = shape(layers)
    with torch.device("meta"):
        names = LlamaForCausalLM(config).state_dict()
        peft = get_peft_model(
            LlamaForSequenceClassification(shape(layers, num_labels=1)),
            LoraConfig(task_type=TaskType.SEQ_CLS, r=16, lora_alpha=32, target_modules=LINEAR),
        )
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    pool = torch.randn(1 << 24).mul_(0.02).to(torch.bfloat16)
    wanted = [Wanted(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in names.items()]
    with Shards(base, wanted) as shards:
        for tensor in wanted:
            shards.write(tensor.name, _random(pool, tensor.nbytes // 2))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    peft.peft_config["default"].save_pretrained(adapter)
    shapes = get_peft_model_state_dict(peft, save_embedding_layers=False)
    save_file({name: torch.randn(t.shape) * 0.01 for name, t in shapes.items()}, adapter / "adapter_model.safetensors")


def _random(pool: torch.Tensor, numel: int) -> Iterator[torch.Tensor]:
    while numel > 0:
        start = int(torch.randint(len(pool) // 2, ()))
        yield pool[start : start + min(numel, len(pool) // 2)]
        numel -= len(pool) // 2


def merge(base: str, adapter: str, output: str) -> None:
    """Merge and print the measurements. This runs in the measured process."""
    _warm(Path(output), size_of(model_files(base)))
    before = _high_water()
    source = Source(adapter, base, None, "4bit", torch.bfloat16, dequantized=True, pad=0, tokens=32000)
    began, cpu = time.perf_counter(), time.process_time()
    Stream(source, torch.bfloat16).run(Path(output))
    seconds = time.perf_counter() - began
    peaks = {"peak_bytes": _high_water(), "peak_before_bytes": before}
    print(json.dumps({"seconds": seconds, "cpu_seconds": time.process_time() - cpu, **peaks}))


def _warm(folder: Path, nbytes: int) -> None:
    """Occupy `nbytes` of the page cache and release them."""
    piece = bytes(1 << 22)
    with (folder / "warm").open("wb", buffering=0) as file:
        for _ in range(0, nbytes, len(piece)):
            file.write(piece)
    (folder / "warm").unlink()


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def measure(layers: int, rounds: int) -> dict[str, Any]:
    """Alternate copies and merges of one base."""
    with _scratch() as folder:
        make(folder, layers)
        files = model_files(str(folder / "base"))
        largest = max(place.nbytes for place in Checkpoint.of_files(files).values())
        copies, merges = [], []
        for _ in range(rounds):
            copies.append(_copy(files, folder / "copy"))
            merges.append(_merge(folder))
        return {
            "base_bytes": size_of(files),
            "largest_tensor_bytes": largest,
            "peak_bytes": max(run["peak_bytes"] for run in merges),
            "peak_before_bytes": max(run["peak_before_bytes"] for run in merges),
            "allowed_bytes": 2 * largest + 1_000_000_000,
            **_times("merge", merges),
            **_times("copy", copies),
            "ratio_of_best": round(min(m["seconds"] for m in merges) / min(c["seconds"] for c in copies), 2),
        }


def _times(what: str, runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {f"{what}_{kind}": [round(run[kind], 2) for run in runs] for kind in ("seconds", "cpu_seconds")}


def _copy(files: list[Path], target: Path) -> dict[str, float]:
    target.mkdir()
    _warm(target, size_of(files))
    began, cpu = time.perf_counter(), _cpu_of_children()
    subprocess.run(["cp", *map(str, files), str(target)], check=True)
    subprocess.run(["sync", *(str(target / file.name) for file in files)], check=True)
    used = {"seconds": time.perf_counter() - began, "cpu_seconds": _cpu_of_children() - cpu}
    shutil.rmtree(target)
    return used


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _merge(folder: Path) -> dict[str, Any]:
    output = folder / "merged"
    output.mkdir()
    places = [str(folder / "base"), str(folder / "adapter"), str(output)]
    command = [sys.executable, "-m", "benchmarks.merge_memory", "--merge", *places]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    shutil.rmtree(output)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="merge_memory_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="Measure one backbone of this depth and print it.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"How often each is run. [{ROUNDS}]")
    parser.add_argument("--merge", nargs=3, metavar=("BASE", "ADAPTER", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.merge:
        merge(*options.merge)
    elif options.layers:
        print(json.dumps(measure(options.layers, options.rounds), indent=1))
    else:
        results = [measure(layers, options.rounds) for layers in LAYERS]
        machine = {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[1],  # above the number of cores, other work inflates the seconds
            "torch": torch.__version__,
        }
        RESULT.write_text(json.dumps({"machine": machine, "backbones": results}, indent=1) + "\n", encoding="utf-8")
        print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
