"""Memory of one rank of a ZeRO-3 job with a 4-bit backbone: a script for torchrun, used by test_zero3.py.

    torchrun --nproc_per_node 2 tests/backbone/zero3_ranks.py '{"out": ..., "jobs": [{"name": ..., "backbone": ...}]}'

Memory is RssAnon of /proc/self/status: the process's own pages. A mapped checkpoint counts in VmRSS, but its pages
belong to the file: all readers share them, and the kernel reclaims them if memory is short.
"""

import ctypes
import gc
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from bitsandbytes.nn import Params4bit
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations import HfDeepSpeedConfig

from qlora_rm.backbone.adapter import attach_adapter
from qlora_rm.backbone.load import load_backbone
from qlora_rm.backbone.packed import forest_batch, probe_backward, sharing_model
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.backbone.zero3 import sharded_loading
from qlora_rm.backbone.zero3_gather import gathered_at_work, is_sharded
from qlora_rm.config import AdapterConfig, BackboneConfig

BATCH = [[7, 8, 9, 10, 11], [7, 8, 9, 12], [7, 13]]


def engine_config(**zero: object) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
    }


def own_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])  # type: ignore[index]


def give_back_freed_memory() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def watched(report: dict[str, int]) -> Iterator[None]:
    """Record in `report` by how many bytes this process grew inside the block, at its peak and permanently."""
    give_back_freed_memory()
    before = peak = own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, own_memory())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    give_back_freed_memory()
    report.update(load_peak=peak - before, load_after=own_memory() - before)


def live_uint8_bytes() -> int:
    """Bytes of all live tensors of packed weights (and of their quantized constants), each storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.dtype == torch.uint8]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def packed_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if isinstance(parameter, Params4bit):
            with deepspeed.zero.GatheredParameters([parameter]):
                digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def state_bytes(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return 0
    return state.absmax.nbytes + state.code.nbytes + state.state2.absmax.nbytes + state.state2.code.nbytes


def frozen_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Of the frozen backbone: total bytes, bytes on this rank, and the same for the quantization state."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    packed = [p for p in frozen if isinstance(p, Params4bit)]
    return {
        "whole": sum(p.ds_numel * p.element_size() for p in frozen),
        "here": sum(p.ds_tensor.nbytes for p in frozen),
        "packed_whole": sum(p.ds_numel for p in packed),
        "packed_here": sum(p.ds_tensor.nbytes for p in packed),
        "largest_packed": max((p.ds_numel for p in packed), default=0),
        "state": sum(map(state_bytes, frozen)),
    }


def before_the_engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Scores of the model as it is, a backward pass, and the sharded parameters that these left gathered."""
    with gathered_at_work(model):
        ended = [[*ids, tokenizer.eos_token_id] for ids in BATCH]
        scores = score_sequences(model, ended, pad_token_id=tokenizer.pad_token_id)
        if sharing_model(model) is not None:
            probe_backward(model)
    left = [name for name, p in model.named_parameters() if is_sharded(p) and p.numel()]
    whole = [name for name, p in model.named_parameters() if not is_sharded(p)]
    return {"scores": scores.tolist(), "left": left, "whole": whole}


def run(job: dict) -> dict:
    """Load, attach, start the engine and train a few steps; report the memory of each stage."""
    report: dict = {}
    config = engine_config(**job.get("zero", {}))
    tokenizer = AutoTokenizer.from_pretrained(job["backbone"])
    registered = HfDeepSpeedConfig(config)  # transformers keeps a weak reference
    live = live_uint8_bytes()  # DeepSpeed's registries may keep an earlier job's model alive
    set_seed(0)
    with watched(report):
        backbone = load_backbone(
            BackboneConfig(
                model_name_or_path=job["backbone"],
                quantization=job.get("quantization", "4bit"),
                share_prefix=job.get("share_prefix", "true"),  # makes a probe that finds a difference an error
                max_unquantized=1,
            ),
            tokenizer,
            torch.float32,
            loading=None if job.get("stock") else sharded_loading,
        )
    if job.get("without_mend"):
        del Params4bit.view
    if not job["steps"]:
        return report | before_the_engine(backbone.model, tokenizer)
    set_seed(0)
    model = attach_adapter(backbone, AdapterConfig(lora_r=4)).train()
    del registered
    report["head"] = backbone.model.score.modules_to_save["default"].weight.tolist()[0][:4]
    report["hash_before"] = packed_hash(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=torch.optim.AdamW(trained, lr=1e-2))
    report["hash_after"] = packed_hash(model)
    report["frozen"] = frozen_bytes(model)
    batch = forest_batch(BATCH, tokenizer.pad_token_id)
    losses = []
    for step in range(job["steps"]):
        scores = engine(**batch).logits[:, 0]
        if step == 0:
            report["live_after_forward"] = live_uint8_bytes() - live
        loss = -torch.nn.functional.logsigmoid(scores[0] - scores[1] + 0.1 * scores[2])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    report["losses"] = losses
    digest = hashlib.sha256()
    for parameter in trained:
        with deepspeed.zero.GatheredParameters([parameter]):
            digest.update(parameter.detach().contiguous().numpy().tobytes())
    report["trained"] = digest.hexdigest()
    engine.destroy()
    return report


def main(order: dict, run: Callable[[dict], dict] = run) -> None:
    deepspeed.init_distributed("gloo")
    reports = {job["name"]: run(job) for job in order["jobs"]}
    rank = torch.distributed.get_rank()
    Path(order["out"], f"rank{rank}.json").write_text(json.dumps(reports))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
