"""The command line of a setting: options of `qlora-rm train` and of `accelerate launch`."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_rm.planning.memory import Setting

CONFIGS = {"single": "single_gpu", "ddp": "ddp", "zero2": "zero2", "zero3": "zero3", "zero3_offload": "zero3_offload"}
CPU_CONFIGS = {"ddp": "cpu_ddp", "zero2": "cpu_zero2", "zero3": "cpu_zero3"}
MODEL, ROWS = "BACKBONE", "ROWS.jsonl"
"""Placeholders in a plan that names no model, or no data."""


def launch_line(setting: Setting, options: Mapping[str, Any], *, cuda: bool = True) -> str:
    """Build the `accelerate launch` command for a setting, with the train `options` that affect its memory.

    Arguments:
        options: name to value. The caller leaves out None and values that equal a flag's absence.
    """
    words = ["accelerate", "launch", "--quiet"]
    if name := config_name(setting, cuda):
        words += ["--config_file", f"accelerate_configs/{name}.yaml"]
    if setting.ranks > 1:
        words += ["--num_processes", str(setting.ranks)]
    if setting.nodes > 1:
        words += ["--num_machines", str(setting.nodes), "--machine_rank", "0"]
        words += ["--main_process_ip", "HOST", "--main_process_port", "29500"]
    words += ["-m", "qlora_rm.train"]
    for name, value in {**options, **door_options(setting)}.items():
        many = isinstance(value, Sequence) and not isinstance(value, str)
        words += [f"--{name}", *(map(str, value) if many else [str(value)])]
    environment = "" if cuda else "CUDA_VISIBLE_DEVICES= "
    if not cuda and setting.stage:
        environment = f"DS_ACCELERATOR=cpu {environment}"
    return environment + shlex.join(words)


def door_options(setting: Setting) -> dict[str, Any]:
    """The setting as options of the train command."""
    return {
        "engine": setting.engine.removesuffix("_offload"),
        "per_device_train_batch_size": setting.pairs,
        "gradient_accumulation_steps": setting.accumulation,
        "gradient_checkpointing": setting.checkpointing,
    }


def config_name(setting: Setting, cuda: bool = True) -> str | None:
    """Name of the file in accelerate_configs/; None for one process on a CPU, which needs none."""
    if not cuda:
        return None if setting.engine == "single" else CPU_CONFIGS[setting.engine]
    if setting.nodes > 1:
        return "multi_node_zero3"
    return CONFIGS[setting.engine]
