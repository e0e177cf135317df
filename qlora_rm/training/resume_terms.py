"""The terms of a run: what a checkpoint records of its command, so that no run is resumed on other terms.

`ON_RESUME` lists which options a resumed run may change. Options in neither of its parts (logging, saving, evaluation,
output folder) do not affect the result, and may change.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from transformers.trainer import SCHEDULER_NAME
from transformers.utils import cached_file

from qlora_rm.artifacts.hashes import sampled
from qlora_rm.artifacts.manifest import FILE_NAME as MANIFEST
from qlora_rm.artifacts.manifest import Manifest, hash_of_config
from qlora_rm.backbone.paths import is_local
from qlora_rm.config import require
from qlora_rm.errors import UserError
from qlora_rm.training.arguments import Options
from qlora_rm.training.engine import asked_engine
from qlora_rm.training.sampling import comparisons_kept

FILE_NAME = "run_terms.json"

ON_RESUME: dict[str, tuple[str, ...]] = {
    # moments and step come from the checkpoint; these come from the command, evaluated at that step
    "obeyed": (
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    ),
    # these determine what is learned, from which pairs in which order, and into which weights
    "refused": (
        *("objective", "ties", "tie_threshold", "label_smoothing", "center_rewards_coefficient"),
        *("seed", "data_seed", "group_by_prompt", "train_sampling_strategy", "dataloader_drop_last", "max_length"),
        *("over_long", "quantization", "compute_dtype", "use_lora", "adapter", "lora_r", "lora_alpha", "lora_dropout"),
        *(
            "lora_target_modules",
            "lora_experts",
            "lora_layers",
            "use_rslora",
            "use_dora",
            "disable_dropout",
            "neftune_noise_alpha",
        ),
        *("optim", "optim_args"),
    ),
}
SCHEDULE = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
)
ADAPTIVE = ("reduce_lr_on_plateau", "greedy")
"""Schedules that depend on the run so far, and so cannot be evaluated at an arbitrary step."""


@dataclass(frozen=True)
class Terms:
    """What determines a run's results, apart from its data (the manifest's fingerprint) and its tokens (its contract).

    Attributes:
        options: values of the options named in `ON_RESUME`.
        engine: "single", "ddp", or "zero1" to "zero3".
        micro_batch, accumulation: comparisons in a forward pass of one process, and such passes per optimizer step.
        base: what identifies the backbone, whatever its name; see `identity`.
    """

    options: dict[str, Any]
    engine: str
    world_size: int
    micro_batch: int
    accumulation: int
    base: dict[str, str | None]

    @classmethod
    def of(cls, options: Options, weights_sha256: str | None = None) -> Self:
        """Return the terms of a command.

        Arguments:
            weights_sha256: hash of every byte of the base, under `--verify_base full`.
        """
        args = options.training
        given = {**asdict(options.objective), **asdict(options.adapter), **vars(options.data), **vars(options.backbone)}
        given |= vars(args) | {"compute_dtype": str(args.compute_dtype)}
        if given["adapter"] is not None:
            given["adapter"] = str(Path(given["adapter"]).resolve())
        names = (*ON_RESUME["obeyed"], *ON_RESUME["refused"])
        return cls(
            # through JSON, so that terms read from a file compare equal
            options=json.loads(json.dumps({name: given[name] for name in names}, default=str)),
            engine=asked_engine(args),
            world_size=args.world_size,
            micro_batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            base=identity(str(options.backbone.model_name_or_path), options.backbone.model_revision)
            | ({"every byte of its weights": weights_sha256} if weights_sha256 else {}),
        )

    @property
    def batch(self) -> int:
        """Comparisons per optimizer step, over all processes."""
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def is_sharded(self) -> bool:
        """Whether the optimizer's state is in DeepSpeed's files, one part per process."""
        return self.engine.startswith("zero")

    def save(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the terms of the run that wrote `folder`, or raise a `UserError`."""
        try:
            return cls(**json.loads((folder / FILE_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{folder} cannot be resumed: its {FILE_NAME} cannot be read ({error}).") from None


def reconcile(before: Terms, now: Terms, args: Any, folder: Path) -> list[str]:
    """Compare a command with the terms of the checkpoint `folder` that it resumes, and keep the size of a step.

    Arguments:
        args: the command's `TrainingConfig`. If the number of processes or the micro-batch changed, its
            `gradient_accumulation_steps` is set so that a step holds the same comparisons.

    Returns messages about the changes that are obeyed.

    Raises:
        UserError: a resumed run can neither obey a change nor silently ignore it.
    """
    hashed = "every byte of its weights"  # compared if both runs had --verify_base full
    names = [name for name in before.base if name != hashed or hashed in now.base]
    differing = [name for name in names if before.base[name] != now.base.get(name)]
    require(
        not differing,
        f"{folder} was trained on another base than this command's: its {' and '.join(differing)} differ. An adapter fits "
        "the base it was trained on only; name that base, or start anew in another --output_dir.",
    )
    for name in ON_RESUME["refused"]:
        is_now = now.options[name]
        was = before.options.get(name, is_now)
        require(was == is_now, f"--{name} was {was} in the run of {folder} and is {is_now} now. {_way_out(name, was)}")
    require(
        (folder / SCHEDULER_NAME).exists(),
        f"{folder} was saved with --save_only_model: the optimizer's state is not in it, and a run cannot go on without.",
    )
    _require_engine(before, now, folder)
    return [*_obeyed(before, now), *_same_batch(before, now, args)]


def _obeyed(before: Terms, now: Terms) -> list[str]:
    changed = [name for name in ON_RESUME["obeyed"] if before.options.get(name) != now.options[name]]
    kinds = (before.options["lr_scheduler_type"], now.options["lr_scheduler_type"])
    stuck = [name for name in changed if name in SCHEDULE and set(kinds) & set(ADAPTIVE)]
    if stuck:
        name = stuck[0]
        raise UserError(
            f"--{name} was {before.options[name]} and is {now.options[name]} now, and the schedule {kinds[0]} goes by what "
            f"has happened, so that it cannot be taken up elsewhere. {_way_out(name, before.options[name])}"
        )
    return [f"resumed with --{name} {now.options[name]} (was {before.options[name]})" for name in changed]


def _require_engine(before: Terms, now: Terms, folder: Path) -> None:
    same = before.engine == now.engine if before.is_sharded or now.is_sharded else True
    require(
        same,
        f"{folder} was saved under {before.engine}, this command runs {now.engine}: the optimizer's state cannot be carried "
        f"over. Launch with the configuration of {before.engine}; the number of processes may be another.",
    )


def _same_batch(before: Terms, now: Terms, args: Any) -> list[str]:
    if before.batch == now.batch:
        return []
    held = f"An optimizer step of the run held {before.batch} comparisons"
    if (before.micro_batch, before.world_size) == (now.micro_batch, now.world_size):
        raise UserError(
            f"--gradient_accumulation_steps was {before.accumulation} and is {now.accumulation} now. {held}, and its data "
            f"order goes by them. {_way_out('gradient_accumulation_steps', before.accumulation)}"
        )
    at_once = now.micro_batch * now.world_size
    require(
        not args.dataloader_drop_last or before.micro_batch == now.micro_batch,
        f"--dataloader_drop_last leaves out what does not fill a micro-batch, and --per_device_train_batch_size was "
        f"{before.micro_batch} and is {now.micro_batch} now: other comparisons would be left out. "
        f"{_way_out('per_device_train_batch_size', before.micro_batch)}",
    )
    if before.batch % at_once or args.deepspeed:
        fitting = [n for n in range(1, before.batch + 1) if before.batch % (n * now.world_size) == 0]
        ways = ", ".join(f"{n} with {before.batch // (n * now.world_size)}" for n in fitting[-4:])
        wanted = (
            f"for {now.world_size} processes give --per_device_train_batch_size with --gradient_accumulation_steps: {ways}"
            if fitting
            else f"{now.world_size} processes cannot share that: give a number that divides it"
        )
        raise UserError(f"{held}, this command's would hold {now.batch}; {wanted}.")
    args.gradient_accumulation_steps = before.batch // at_once
    return [
        f"gradient accumulation: {args.gradient_accumulation_steps} instead of {now.accumulation}, so that {now.world_size} x "
        f"{now.micro_batch} comparisons at once make a step of {before.batch}, as before"
    ]


def _way_out(name: str, was: Any) -> str:
    given = f"Give --{name} {was}" if was is not None else f"Leave --{name} away"
    return f"{given} to go on, or start anew in another --output_dir."


def identity(name_or_path: str, revision: str | None) -> dict[str, str | None]:
    """Return what identifies a base, wherever it is stored: its configuration and its weights.

    A commit identifies the weights of a hub id, and samples of every weight file those of a folder. Two fine-tunes of
    one model differ in nothing else, and a hash of every byte would read the model twice.
    """
    if not is_local(name_or_path):
        try:
            commit = Path(str(cached_file(name_or_path, "config.json", revision=revision))).parent.name
        except OSError:
            commit = None
        return {"configuration": hash_of_config(name_or_path, revision), "commit": commit}
    folder = Path(name_or_path).expanduser()
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.index.json")])
    return {"configuration": hash_of_config(name_or_path), "weights": sampled(files)}


def finished_steps(args: Any, comparisons: int) -> int | None:
    """Return the optimizer steps of the run in `output_dir` if it is complete and as long as this command's; else None.

    Arguments:
        comparisons: number of comparisons the command trains on.
    """
    if not (Path(args.output_dir) / MANIFEST).exists():
        return None
    training = Manifest.load(args.output_dir).training
    return training.steps if training is not None and training.steps >= planned_steps(args, comparisons) else None


def planned_steps(args: Any, comparisons: int) -> int:
    """Return the optimizer steps of a command that trains on so many comparisons."""
    if args.max_steps > 0:
        return int(args.max_steps)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    kept = comparisons_kept(comparisons, args.per_device_train_batch_size, args.dataloader_drop_last)
    return math.ceil(args.num_train_epochs * max(math.ceil(kept / batch), 1))
