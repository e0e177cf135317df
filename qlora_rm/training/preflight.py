"""What can be known to go wrong before weights are loaded, told then: on all ranks alike, and once."""

import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.backbone.load import read_model_config
from qlora_rm.console import say
from qlora_rm.errors import UserError
from qlora_rm.training.arguments import Options, TrainingConfig
from qlora_rm.training.disk import DiskNeed
from qlora_rm.training.engine import launched_engine, require_engine

OWN_TO_A_RANK = {"local_rank", "logging_dir", "run_name"}
"""Training options that may differ between the ranks of one job."""
SEEN_WITHIN = 10.0
"""Seconds until a file that rank 0 wrote must be seen on the other hosts of a shared folder."""


@dataclass(frozen=True)
class Report:
    """What one rank tells the others.

    Attributes:
        marker: name of a file that this rank has written to the output folder.
        problem: why this rank cannot train; None where it can.
        facts: what must be the same on all ranks, by name, each a printable value or a mapping of such.
    """

    rank: int
    host: str
    marker: str
    problem: str | None
    facts: dict[str, Any]

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def preflight(options: Options, manifest: Manifest, comparisons: int, resume: Path | None) -> None:
    """Check launch, engine settings, folder, disk, and that all ranks are told and read the same.

    Every rank must call it; all of them go on, or all raise the same error.

    Arguments:
        manifest: as it stands before training.
        comparisons: in the training set.
        resume: the checkpoint this rank will go on from.

    Raises:
        UserError: the first rank's problem, or what differs between two ranks.
    """
    args, folder = options.training, Path(str(options.training.output_dir))
    marker = folder / f".preflight-{uuid.uuid4().hex}"
    try:
        problem, warnings = None, list[str]()
        try:
            warnings = _check_here(options, comparisons, marker)
        except UserError as error:
            problem = str(error)
        mine = Report(args.process_index, socket.gethostname(), marker.name, problem, _facts(options, manifest, resume))
        reports = _exchange(mine, args)
        _raise_first(reports)
        _require_alike(reports)
        shared = args.save_on_each_node or _is_seen(folder / reports[0].marker)
        _raise_first(_exchange(replace(mine, problem=None if shared else _not_shared(folder)), args))
    finally:
        marker.unlink(missing_ok=True)
    say(*warnings)


def _check_here(options: Options, comparisons: int, marker: Path) -> list[str]:
    """What one rank can see alone; warnings, or the first problem as a `UserError`."""
    args = options.training
    engine = launched_engine(args)
    require_engine(args, engine)
    config = read_model_config(
        str(options.backbone.model_name_or_path), options.backbone.model_revision, args.trust_remote_code
    )
    if engine.name.startswith("zero"):
        _require_sound_settings(options, config, args.deepspeed_plugin.deepspeed_config)
    try:
        marker.touch()
    except OSError as error:
        raise UserError(f"--output_dir {marker.parent} is not writable: {error.strerror}.") from error
    need = DiskNeed.of(options, config, engine.name, comparisons)
    warnings = [need.require_room(marker.parent)]
    if args.device.type == "cuda" and args.distributed_state.backend == "gloo":
        warnings.append("warning: the ranks talk over gloo, through host memory; --ddp_backend nccl keeps to the cards")
    return [warning for warning in warnings if warning]


def _require_sound_settings(options: Options, config: PretrainedConfig, engine: dict[str, Any]) -> None:
    unsound = unsound_settings(
        engine,
        quantized=options.backbone.quantization != "none",
        storage=stored_as(config),
        adapter=options.adapter.use_lora,
        args=options.training,
    )
    if unsound:
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or options.training.deepspeed
        where = f" {file}" if isinstance(file, str) and file != "none" else ""
        raise UserError(f"The DeepSpeed configuration{where} cannot train this model right: {'; '.join(unsound)}.")


def unsound_settings(
    engine: dict[str, Any], *, quantized: bool, storage: str, adapter: bool, args: TrainingConfig
) -> list[str]:
    """DeepSpeed settings that spoil 4-bit weights or an fp32 adapter, most of them without a word; each with the way out.

    Arguments:
        engine: the DeepSpeed configuration, "auto" where the trainer will fill in its own.
        storage: dtype in which a pre-quantized checkpoint keeps its packed bytes; uint8 otherwise.
        adapter: LoRA is trained, not the whole model.
    """
    zero = engine.get("zero_optimization", {})
    found = []
    if quantized:
        for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
            if zero.get(name):
                found.append(f"{name} rounds the packed 4-bit bytes once more and destroys them: take it out")
        if zero.get("stage3_use_all_reduce_for_fetch_params"):
            found.append(
                "stage3_use_all_reduce_for_fetch_params gathers weights of one dtype only, and a quantized model has several: "
                "take it out"
            )
        if (zero.get("offload_param") or {}).get("device") == "nvme":
            found.append(
                "offload_param to nvme has not been shown to bring packed bytes back as they were: use the device cpu, as "
                "ds_configs/zero3_offload.json does"
            )
        if storage != "uint8":
            found.append(
                f"the checkpoint keeps its packed bytes as {storage} (bnb_4bit_quant_storage), which the engine casts and "
                "so corrupts: quantize the 16-bit checkpoint while loading, or one stored as uint8"
            )
    for name, asked in (("bf16", args.bf16), ("fp16", args.fp16)):
        enabled = engine.get(name, {}).get("enabled", False)
        if adapter and (asked if enabled == "auto" else enabled):
            found.append(
                f"{name}.enabled casts adapter and head to 16 bit: set it to false and give torch_autocast, as "
                "ds_configs/zero3.json does"
            )
    clip = engine.get("gradient_clipping", "nothing")
    if clip not in ("auto", args.max_grad_norm):
        found.append(f'gradient_clipping says {clip}, --max_grad_norm {args.max_grad_norm}: set it to "auto"')
    return found


def stored_as(config: PretrainedConfig) -> str:
    """dtype of the packed bytes in a checkpoint that was saved in 4 bit; what this project packs into otherwise."""
    saved = getattr(config, "quantization_config", None) or {}
    settings = saved if isinstance(saved, dict) else saved.to_dict()
    return str(settings.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")


def _facts(options: Options, manifest: Manifest, resume: Path | None) -> dict[str, Any]:
    training = {
        f.name: getattr(options.training, f.name) for f in fields(options.training) if f.name not in OWN_TO_A_RANK
    }
    told = (
        asdict(options.data),
        asdict(options.backbone),
        asdict(options.adapter),
        asdict(options.objective),
        training,
    )
    return {
        "options": {name: str(value) for part in told for name, value in part.items()},
        "library versions": manifest.versions,
        "base": f"a config.json with sha256 {manifest.base.config_sha256}",
        "tokenizer": asdict(manifest.contract),
        "data": manifest.training.data_fingerprint if manifest.training else None,
        "checkpoint": str(resume) if resume else "none",
    }


WAYS_OUT = {
    "options": "Start every process with the same options.",
    "library versions": "Give every host the same environment.",
    "base": "Give every host the same copy of the backbone.",
    "tokenizer": "Give every host the same copy of the tokenizer.",
    "data": "Give every host the same files and options.",
    "checkpoint": "Put --output_dir on a file system that all hosts share.",
}


def _require_alike(reports: list[Report]) -> None:
    first = reports[0]
    for report in reports[1:]:
        for name, fact in report.facts.items():
            if fact == first.facts[name]:
                continue
            if name == "data":
                raise UserError(f"The processes read different data ({first} and {report}): {WAYS_OUT[name]}")
            here, there = _difference(first.facts[name], fact)
            raise UserError(
                f"The processes differ in {name}: {first} has {here}, {report} has {there}. {WAYS_OUT[name]}"
            )


def _difference(one: Any, two: Any) -> tuple[str, str]:
    """The two values, or of two mappings the first entry in which they differ."""
    if not isinstance(one, dict):
        return str(one), str(two)
    name = next(key for key in {**one, **two} if one.get(key) != two.get(key))
    return f"{name} {one.get(name)}", f"{name} {two.get(name)}"


def _raise_first(reports: list[Report]) -> None:
    failed = [report for report in reports if report.problem]
    if failed:
        problem = str(failed[0].problem)
        everyones = all(report.problem == problem for report in reports)
        raise UserError(problem if everyones else f"{failed[0]}: {problem}")


def _exchange(mine: Any, args: TrainingConfig) -> list[Any]:
    """Every rank's value, in order of rank."""
    if args.world_size == 1:
        return [mine]
    everyones: list[Any] = [None] * args.world_size
    torch.distributed.all_gather_object(everyones, mine)
    return everyones


def _is_seen(marker: Path) -> bool:
    """Whether this host sees what rank 0 wrote; a network file system may take its time."""
    until = time.monotonic() + SEEN_WITHIN
    while not marker.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _not_shared(folder: Path) -> str:
    return (
        f"--output_dir {folder} is not the folder that rank 0 writes to. Put it on a file system that all hosts share, or "
        "pass --save_on_each_node true."
    )
