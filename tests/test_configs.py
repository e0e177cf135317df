"""The launch configurations are valid for the libraries that read them, and keep the rules that training depends on."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from deepspeed.runtime.config import DeepSpeedConfig

ROOT = Path(__file__).resolve().parents[1]
LAUNCHES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
TWINS = sorted((ROOT / "ds_configs").glob("*.json"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

LAUNCH_NAMES = {
    "single_gpu", "ddp", "zero2", "zero3", "zero3_offload", "multi_node_zero3", "cpu_ddp", "cpu_zero2", "cpu_zero3",
    "cpu_two_nodes_zero3",
}  # fmt: skip


def by_name(path: Path) -> str:
    return path.stem


def head_comment(path: Path) -> str:
    """Return the leading comment lines of a file without their marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    count = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.lstrip("# ") for line in lines[:count])


def paths_named(text: str) -> set[str]:
    """Return the files of this repository that a command line names."""
    return set(re.findall(r"\b(?:accelerate_configs|recipes|qlora_rm)/[\w./-]*\w", text))


def load(path: Path) -> ClusterConfig:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    return config


def engine(path: Path) -> dict[str, Any]:
    """Return a DeepSpeed configuration with its `auto` values filled in as the trainer does."""
    settings: dict[str, Any] = json.loads(path.read_text())
    filled = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    assert {key for key, value in settings.items() if value == "auto"} == {*filled, "gradient_clipping"}
    return settings | filled | {"gradient_clipping": 0.5}


def test_the_set_is_whole() -> None:
    assert {path.stem for path in LAUNCHES} == LAUNCH_NAMES
    sharded = {path.stem for path in LAUNCHES if load(path).distributed_type == DistributedType.DEEPSPEED}
    assert sharded == {path.stem for path in TWINS}
    assert RECIPES, "no recipe under recipes/"


@pytest.mark.parametrize("path", LAUNCHES, ids=by_name)
def test_launch_is_read_by_accelerate(path: Path) -> None:
    config = load(path)
    assert config.num_processes % config.num_machines == 0
    assert not config.use_cpu
    if config.distributed_type == DistributedType.DEEPSPEED:
        assert config.deepspeed_config["deepspeed_config_file"] == f"ds_configs/{path.stem}.json"
        # accelerate refuses to start if these are given together with a DeepSpeed file
        doubled = {"gradient_accumulation_steps", "gradient_clipping", "zero_stage", "offload_optimizer_device"}
        assert not doubled & set(config.deepspeed_config)
        assert config.mixed_precision is None
    assert config.distributed_type != DistributedType.MULTI_CPU  # would start one process and leave the rest to MPI


@pytest.mark.parametrize("path", [*LAUNCHES, *RECIPES], ids=by_name)
def test_file_opens_with_its_own_command(path: Path) -> None:
    head = head_comment(path)
    assert "accelerate launch" in head or "qlora-rm " in head
    named = paths_named(head)
    assert f"{path.parent.name}/{path.name}" in named
    assert not {name for name in named if not (ROOT / name).exists()}
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("path", TWINS, ids=by_name)
def test_engine_is_read_by_deepspeed(path: Path) -> None:
    settings = engine(path)
    config = DeepSpeedConfig(settings)
    stage = int(re.search(r"zero(\d)", path.stem)[1])  # type: ignore[index]
    assert config.zero_config.stage == settings["zero_optimization"]["stage"] == stage
    assert config.gradient_clipping == 0.5
    assert not config.zero_config.model_extra


@pytest.mark.parametrize("path", TWINS, ids=by_name)
def test_engine_does_not_touch_packed_weights(path: Path) -> None:
    """A 16-bit engine casts, quantized collectives requantize, NVMe offload rewrites weights that must stay packed."""
    settings = engine(path)
    zero = settings["zero_optimization"]
    assert settings["bf16"] == settings["fp16"] == {"enabled": False}
    assert not [key for key in zero if key.startswith(("zero_quantized", "mics"))]
    assert "stage3_use_all_reduce_for_fetch_params" not in zero
    assert "nvme" not in json.dumps(settings)


@pytest.mark.parametrize("path", TWINS, ids=by_name)
def test_adapter_and_head_stay_fp32(path: Path) -> None:
    autocast = engine(path).get("torch_autocast")
    if path.stem.startswith("cpu_"):
        assert autocast is None
    else:
        assert autocast == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def test_small_tensors_are_sharded_in_tests() -> None:
    """DeepSpeed does not shard tensors below its threshold, and a test's model has no larger ones."""
    for name in ("cpu_zero3", "cpu_two_nodes_zero3"):
        zero = engine(ROOT / "ds_configs" / f"{name}.json")["zero_optimization"]
        assert zero["stage3_param_persistence_threshold"] == 0


@pytest.mark.parametrize("name", ["multi_node_zero3", "cpu_two_nodes_zero3"])
def test_machines_meet_in_one_rendezvous(name: str) -> None:
    launch = load(ROOT / "accelerate_configs" / f"{name}.yaml")
    assert launch.num_machines == 2 and launch.rdzv_backend == "static" and launch.same_network
    assert launch.deepspeed_config["deepspeed_multinode_launcher"] == "standard"


def test_the_slurm_script_is_whole() -> None:
    path = ROOT / "recipes" / "train.slurm"
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[1].startswith("# sbatch recipes/train.slurm ")
    named = paths_named(text) | set(re.findall(r"\bds_configs/[\w./-]*\w", text))
    assert len(named) > 3 and not {name for name in named if not (ROOT / name).exists()}
    options, _, commands = text.partition("\nset -euo pipefail\n")
    assert "#SBATCH" not in commands, "SLURM reads no option after the first command"
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", options, re.MULTILINE))
    assert asked["ntasks-per-node"] == "1" and "requeue" in asked
    quoted = commands.partition("on_a_node='")[2].partition("'")[0]
    assert 'accelerate launch --machine_rank "$SLURM_NODEID" "$@"' in quoted, "read on each node"
    grace = int(re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", commands)[1])  # type: ignore[index]
    assert grace < int(asked["signal"].removeprefix("B:USR1@"))
    cards = engine(ROOT / "ds_configs" / "multi_node_zero3.json")["zero_optimization"]["zero_hpz_partition_size"]
    assert int(asked["gpus-per-node"]) == cards


def test_second_shards_stay_within_a_machine() -> None:
    launch = load(ROOT / "accelerate_configs" / "multi_node_zero3.yaml")
    zero = engine(ROOT / "ds_configs" / "multi_node_zero3.json")["zero_optimization"]
    assert zero["zero_hpz_partition_size"] == launch.num_processes // launch.num_machines
