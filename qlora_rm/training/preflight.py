"""Checks that run before weights are loaded; all ranks raise the same error, and it is reported once."""

import socket
import time
import uuid
from dataclasses import asdict, dataclass, fields, replace
from heapq import nlargest
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.backbone.load import read_model_config
from qlora_rm.backbone.saved_quantization import require_obeyable
from qlora_rm.console import is_main_process, say
from qlora_rm.errors import UserError
from qlora_rm.planning.fit_check import memory_warning
from qlora_rm.planning.memory import Setting
from qlora_rm.planning.workload import HEAVIEST
from qlora_rm.training.arguments import Options, TrainingConfig
from qlora_rm.training.disk import DiskNeed
from qlora_rm.training.engine import Engine, launched_engine, require_engine
from qlora_rm.training.engine_settings import require_sound_settings
from qlora_rm.training.hub import Hub
from qlora_rm.training.ranks import exchange

OWN_TO_A_RANK = {"local_rank", "logging_dir", "run_name", "hub_token"}
"""Training options that may differ between the ranks of one job, or must not be printed."""
SEEN_WITHIN = 10.0
"""Seconds within which a file that rank 0 wrote must be visible to the other hosts of a shared folder."""


@dataclass(frozen=True)
class Report:
    """What one rank reports to the others.

    Attributes:
        marker: name of a file that this rank wrote to the output folder.
        problem: why this rank cannot train; None if it can.
        facts: what must be the same on all ranks, by name; each is a printable value or a mapping of such values.
    """

    rank: int
    host: str
    marker: str
    problem: str | None
    facts: dict[str, Any]

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def preflight(options: Options, manifest: Manifest, train: Dataset, resume: Path | None) -> None:
    """Check launch, engine settings, folder, disk and memory, and that all ranks have the same options and inputs.

    Every rank must call it; all of them continue, or all raise the same error.

    Arguments:
        manifest: its state before training.
        train: the tokenized training set.
        resume: the checkpoint that this rank will resume from.

    Raises:
        UserError: the first rank's problem, or what differs between two ranks.
    """
    args, folder = options.training, Path(str(options.training.output_dir))
    marker = folder / f".preflight-{uuid.uuid4().hex}"
    try:
        problem, warnings = None, list[str]()
        try:
            warnings = _check_here(options, train, marker)
        except UserError as error:
            problem = str(error)
        mine = Report(args.process_index, socket.gethostname(), marker.name, problem, _facts(options, manifest, resume))
        reports = exchange(mine, args.world_size)
        _raise_first(reports)
        _require_alike(reports)
        shared = args.save_on_each_node or _is_seen(folder / reports[0].marker)
        everyones = exchange(replace(mine, problem=None if shared else _not_shared(folder)), args.world_size)
        _raise_first(everyones)
    finally:
        marker.unlink(missing_ok=True)
    say(*warnings)


def _check_here(options: Options, train: Dataset, marker: Path) -> list[str]:
    """Run the checks that one rank can make alone; return warnings, or raise the first problem as a `UserError`."""
    args = options.training
    engine = launched_engine(args)
    require_engine(args, engine)
    config = read_model_config(
        str(options.backbone.model_name_or_path), options.backbone.model_revision, args.trust_remote_code
    )
    require_obeyable(str(options.backbone.model_name_or_path), config, options.backbone.quantization)
    if engine.name.startswith("zero"):
        require_sound_settings(options, config, args.deepspeed_plugin.deepspeed_config)
    hub = Hub.of(args)
    if hub is not None and is_main_process():
        hub.require_open()
    try:
        marker.touch()
    except OSError as error:
        raise UserError(f"--output_dir {marker.parent} is not writable: {error.strerror}.") from error
    need = DiskNeed.of(options, config, engine.name, len(train))
    warnings = [
        need.require_room(marker.parent),
        _memory_warning(options, engine, train) if is_main_process() else None,
    ]
    if engine.name == "single" and args.n_gpu and (cards := torch.cuda.device_count()) > 1:
        warnings.append(
            f"this process trains on {args.device}, 1 of the {cards} cards it sees; on all of them: accelerate launch "
            f"--config_file accelerate_configs/ddp.yaml --num_processes {cards} -m qlora_rm.train ..."
        )
    if args.device.type == "cuda" and args.distributed_state.backend == "gloo":
        warnings.append("warning: the ranks talk over gloo, through host memory; --ddp_backend nccl keeps to the cards")
    return [warning for warning in warnings if warning]


def _memory_warning(options: Options, engine: Engine, train: Dataset) -> str | None:
    """Return a warning if a process of this run may not fit into memory; rank 0 plans for all, which are alike."""
    args = options.training
    setting = Setting(
        engine=_planned_as(engine.name, args),
        ranks=args.world_size,
        pairs=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        checkpointing=bool(args.activation_checkpointing),
        hpz=_second_copies(engine.name, args),
    )
    return memory_warning(
        options.backbone,
        options.adapter,
        args.compute_dtype,
        _heaviest(train),
        setting,
        ranks_here=args.ranks_here,
        trust_remote_code=args.trust_remote_code,
    )


def _planned_as(engine: str, args: TrainingConfig) -> Any:
    """Return the planner's name of an engine.

    The planner distinguishes ZeRO-3 with shards in host memory, unless training runs on the CPU anyway.
    """
    if engine == "zero3" and args.device.type == "cuda":
        zero = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
        return "zero3_offload" if (zero.get("offload_param") or {}).get("device") == "cpu" else engine
    return engine


def _second_copies(engine: str, args: TrainingConfig) -> int:
    """Return how many ranks share a second copy of the weights under ZeRO-3; 1 if there is none."""
    if engine != "zero3":
        return 1
    asked = args.deepspeed_plugin.deepspeed_config["zero_optimization"].get("zero_hpz_partition_size", 1)
    return max(1, min(asked, args.world_size))


def _heaviest(train: Dataset) -> Dataset:
    """Return the comparisons with the most tokens and the longest sequences, which the largest micro-batch may hold.

    Reading every row would take too long.
    """
    columns = (list(train["tokens"]), list(train["length"]))
    return train.select(
        sorted({i for sizes in columns for i in nlargest(HEAVIEST, range(len(train)), sizes.__getitem__)})
    )


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
        "base": {
            "a config.json with sha256": manifest.base.config_sha256,
            "weights with the fingerprint": manifest.base.weights_fingerprint,
        },
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
    """Return the two values, or for two mappings the first entry that differs."""
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


def _is_seen(marker: Path) -> bool:
    """Whether this host sees the file that rank 0 wrote; a network file system may show it late."""
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
