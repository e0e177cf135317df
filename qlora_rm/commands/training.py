"""The commands around training: train, plan, recipes, bench, demo."""

import argparse
import subprocess
import sys
from pathlib import Path

from qlora_rm import shipped
from qlora_rm.commands.common import EVALUATED, Run
from qlora_rm.config import AdapterConfig, BackboneConfig, DataConfig, ObjectiveConfig, PlanConfig
from qlora_rm.console import printable
from qlora_rm.errors import UserError
from qlora_rm.options import add_options, read_options
from qlora_rm.progress import Phase

TRAIN_HELP = (
    "The training loop's own options (output_dir, learning_rate, max_steps, per_device_train_batch_size, ...) are those "
    "of TRL's RewardConfig and transformers' TrainingArguments; `qlora-rm train --help_all` prints them all."
)


def add_train(command: argparse.ArgumentParser) -> Run:
    command.epilog = TRAIN_HELP
    command.add_argument("--config", metavar="FILE", help="YAML file of options; flags beat it.")
    for config in (DataConfig, BackboneConfig, AdapterConfig, ObjectiveConfig):
        add_options(command, config)
    return lambda options: None


def add_plan(command: argparse.ArgumentParser) -> Run:
    command.add_argument(
        "model", metavar="MODEL", nargs="?", help="Folder, hub id or config.json of a backbone; no weights are read."
    )
    command.add_argument("--json", action="store_true", help="Print JSON instead of tables; sizes are in bytes.")
    add_options(command, PlanConfig)
    add_options(command, BackboneConfig, ["model_revision", "quantization", "attn_implementation", "share_prefix"])
    add_options(command, AdapterConfig, ["lora_r", "lora_target_modules", "lora_layers", "use_dora"])
    add_options(command, DataConfig, ["over_long", *EVALUATED])
    return _plan


def _plan(options: argparse.Namespace) -> None:
    asked = read_options(options, PlanConfig)
    from qlora_rm.output import as_json
    from qlora_rm.planning.report import make_plan

    with Phase("planning"):
        plan = make_plan(
            options.model,
            asked,
            read_options(options, BackboneConfig),
            read_options(options, AdapterConfig),
            read_options(options, DataConfig),
        )
    print(
        as_json(plan.as_dict()) if options.json else printable("\n".join(plan.lines()), lines=True),
        end="" if options.json else "\n",
    )


def add_demo(command: argparse.ArgumentParser) -> Run:
    command.add_argument("--only-make", action="store_true", help="Stop once the backbone and the data are made.")
    return _demo


def _demo(options: argparse.Namespace) -> None:
    from qlora_rm.demo.walk import demo

    demo(only_make=options.only_make)


def add_recipes(command: argparse.ArgumentParser) -> Run:
    command.add_argument(
        "--copy_to",
        metavar="FOLDER",
        help="Copy recipes/, accelerate_configs/ and ds_configs/ into this folder. The commands in the head of each file "
        "are for that folder. Unset: print where the files are.",
    )
    return _recipes


def _recipes(options: argparse.Namespace) -> None:
    if options.copy_to is None:
        files = [path for folder in shipped.FOLDERS for path in sorted(shipped.shipped(folder).glob("*.*"))]
        print(*files, sep="\n")
        return
    written = shipped.copy_to(Path(options.copy_to))
    print(f"{len(written)} files copied to {options.copy_to}: {', '.join(f'{name}/' for name in shipped.FOLDERS)}")


def add_bench(command: argparse.ArgumentParser) -> Run:
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="hh, finegrained, oasst, zh, short, sweep; unset: all."
    )
    return _bench


def _bench(options: argparse.Namespace) -> int:
    if not Path("benchmarks/prefix_sharing.py").exists():
        raise UserError("The benchmarks stand in benchmarks/: start this in the root of a checkout of the project.")
    return subprocess.run([sys.executable, "-m", "benchmarks.prefix_sharing", *options.names]).returncode
