"""Options of the training loop: TRL's RewardConfig with this project's defaults, and the parser of `qlora-rm train`."""

import argparse
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from transformers.trainer_utils import HubStrategy
from trl import RewardConfig, TrlParser

from qlora_rm.backbone.precision import best_dtype
from qlora_rm.config import AdapterConfig, BackboneConfig, DataConfig, ObjectiveConfig, OutputConfig
from qlora_rm.console import say
from qlora_rm.errors import UserError
from qlora_rm.shipped import here_or_shipped
from qlora_rm.training.library_options import LIBRARY
from qlora_rm.training.optimizer_options import require_optimizer, require_schedule
from qlora_rm.training.option_rules import check_options
from qlora_rm.training.project_options import PROJECT, require_shape_of_adapter


@dataclass
class TrainingConfig(RewardConfig):
    """`trl.RewardConfig` (and so `transformers.TrainingArguments`) with defaults for a LoRA reward model.

    The defaults follow published recipes: ten times the learning rate of full fine-tuning, one epoch, an effective
    batch of 64 comparisons per GPU, cosine decay after 3 % warm-up, centring 0.01.
    """

    output_dir: str | None = field(
        default="runs/reward_model", metadata={"help": "Folder for the model and its checkpoints."}
    )
    engine: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3"] = field(
        default="auto",
        metadata={
            "help": "The engine of this run. The run stops if another engine is in use. auto: the one that the launcher asked for."
        },
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest sequence in tokens; --over_long controls what happens to longer sequences."},
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training comparisons."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Comparisons per device in one forward pass."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "The same in evaluation."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Forward passes per optimizer step."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate over the run."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up: steps, or below 1 a share of all steps."})
    center_rewards_coefficient: float | None = field(
        default=0.01,
        metadata={"help": "Weight of the squared sum of a pair's scores, which keeps scores near zero; 0 for none."},
    )
    eval_strategy: str = field(
        default="steps", metadata={"help": "When to evaluate on the held-out comparisons: no, steps, epoch."}
    )
    eval_steps: float | None = field(
        default=0.1, metadata={"help": "Steps between evaluations, or below 1 a share of all steps."}
    )
    save_steps: float = field(
        default=0.1, metadata={"help": "Steps between checkpoints, or below 1 a share of all steps."}
    )
    save_total_limit: int | None = field(
        default=2,
        metadata={
            "help": "How many recent checkpoints to keep, besides the best one (--metric_for_best_model). Older ones are deleted once a newer one is complete."
        },
    )
    hub_strategy: HubStrategy | str = field(
        default="end",
        metadata={"help": "end: --push_to_hub pushes once, after the run is complete. No other strategy is supported."},
    )
    pad_token: str | None = field(
        default=None,
        metadata={
            "help": "Token to pad with: one of the vocabulary that no text contains. Unset: the tokenizer's own, or where texts "
            "contain that one, a reserved or new token."
        },
    )
    include_num_input_tokens_seen: Literal["no", "all", "non_padding"] = field(
        default="no",
        metadata={
            "help": "Count the tokens of training batches: all, or without padding."
        },  # transformers' field parses as a bool
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036  (HfArgumentParser supports no other order)
        default="none", metadata={"help": "Where to log besides the console: tensorboard, wandb, trackio, ..."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "aliases": ["--resume"],
            "help": "auto: resume from the last usable checkpoint in --output_dir, or start if there is none; do nothing "
            "if the run is complete. restart: begin at step 0 despite unusable checkpoints. Or the folder of a checkpoint.",
        },
    )

    def __post_init__(self) -> None:
        # otherwise transformers 5.23 derives it from its log level, which libraries.py sets
        self.disable_tqdm = bool(self.disable_tqdm)
        if self.bf16 is None and not self.fp16:
            best = torch.float32 if self._deepspeed_autocasts() else best_dtype()[0]
            self.bf16, self.fp16 = best is torch.bfloat16, best is torch.float16
        if torch.cuda.is_available():
            _require_own_card(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())
        else:
            self._settle_on_cpu()
        # transformers 5 deprecates the old name, under which TRL sets its default; remove once TRL renames it
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        asked, self.pad_token = self.pad_token, None  # TRL deprecates it; here it remains an option
        super().__post_init__()
        self.pad_token = asked
        # Without a launcher, transformers 5.23 counts all visible GPUs for nn.DataParallel. TRL 1.16 refuses that, and
        # a 4-bit model is not distributed at all. Train on this process's device only.
        self._n_gpu = min(self.n_gpu, 1)

    def _settle_on_cpu(self) -> None:
        """Set what transformers needs to train on CPUs.

        Ranks communicate over gloo. Outside DeepSpeed, `use_cpu` is set: without it transformers refuses bf16, and each
        rank would train alone. With DeepSpeed, `use_cpu` would turn the engine off.
        """
        self.dataloader_pin_memory = False  # there is no device memory to copy to
        self.use_cpu = self.use_cpu or not asks_for_deepspeed(self)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.ddp_backend = self.ddp_backend or "gloo"

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix multiplications, whether transformers or DeepSpeed casts to it."""
        if self.bf16 or self._deepspeed_autocasts():
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    @property
    def ranks_here(self) -> int:
        """Number of the job's processes on this host; all processes if the launcher sets no LOCAL_WORLD_SIZE."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    def _deepspeed_autocasts(self) -> bool:
        """Whether DeepSpeed casts to bf16 itself (`torch_autocast`), which keeps the trained weights in fp32."""
        config = self.deepspeed or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if isinstance(config, str) and Path(config).is_file():
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        return isinstance(config, dict) and bool(config.get("torch_autocast", {}).get("enabled", False))


def _require_own_card(local_rank: int, visible: int) -> None:
    """Raise a `UserError` if no visible GPU has this process's local rank; CUDA's own error names no remedy."""
    if local_rank >= visible:
        raise UserError(
            f"Process {local_rank} of this host has no card of its own: it sees {visible}. Start no more processes than cards "
            "(--num_processes); under srun ask for --gpus-per-node, not for --gpus-per-task, which shows a task only its own."
        )


def asks_for_deepspeed(args: TrainingConfig) -> bool:
    """Whether the launcher or `--deepspeed` asked for DeepSpeed."""
    return bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


KINDS: list[Any] = [DataConfig, BackboneConfig, AdapterConfig, ObjectiveConfig, TrainingConfig, OutputConfig]
DEFAULTS = {
    item.name: item.default if item.default_factory is MISSING else item.default_factory()
    for kind in KINDS
    for item in fields(kind)
}
"""Default value of every option."""


@dataclass(frozen=True)
class Options:
    """All options of a training run.

    Attributes:
        max_length_given: whether the user gave `--max_length`.
    """

    data: DataConfig
    backbone: BackboneConfig
    adapter: AdapterConfig
    objective: ObjectiveConfig
    training: TrainingConfig
    output: OutputConfig = field(default_factory=OutputConfig)
    max_length_given: bool = True


class Parser(TrlParser):
    """TrlParser whose errors name the nearest known option instead of listing all options."""

    def error(self, message: str) -> NoReturn:
        word = message.rpartition(" --")[2].partition(" ")[0].partition("=")[0]
        raise UserError(f"{message}.{self._hint(word)}")

    def read_file(self, path: str) -> dict[str, Any]:
        """Return the options of a YAML file, checked like flags; argparse does not check defaults.

        Raises:
            UserError: the file cannot be read, has an unknown key, or a value that is not among its choices.
        """
        try:
            content = yaml.safe_load(here_or_shipped(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--config {path}: {error.strerror}.") from error
        except yaml.YAMLError as error:
            raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise UserError(f"--config {path} must hold one mapping of option: value.")
        os.environ.update({name: str(value) for name, value in content.pop("env", {}).items()})
        return self.checked(content, f"--config {path}")

    def checked(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The options of a mapping, by their names in the parser's result.

        Raises:
            UserError: an unknown key, or a value that is not among its choices; the message begins with `where`.
        """
        actions = self._actions_by_name
        options = {}
        for key, value in given.items():
            if key not in self._known:
                raise UserError(f"{where}: unknown key {key!r}.{self._hint(str(key))}")
            options[actions[key].dest] = self._checked(actions[key], value, f"{where}: {key}")
        return options

    def _checked(self, action: argparse.Action, value: Any, where: str) -> Any:
        if action.nargs == "+" and value is not None and not isinstance(value, (list, dict)):
            return [value]  # a single data set need not be a list
        if action.choices is not None and value is not None:
            # YAML parses true and false as booleans even where the choices are words
            word = str(value).lower() if isinstance(value, bool) else str(value)
            choices = [str(choice) for choice in action.choices]
            if word not in choices:
                raise UserError(f"{where}: {value!r} is not one of {', '.join(choices)}.")
            return word
        return value

    def named_in(self, argv: list[str]) -> set[str]:
        """Return the options that a command line names."""
        actions = (self._option_string_actions.get(word.partition("=")[0]) for word in argv)
        return {action.dest for action in actions if action is not None}

    @property
    def _actions_by_name(self) -> dict[str, argparse.Action]:
        """Options by name, including short names."""
        words = {word.removeprefix("--"): action for action in self._actions for word in action.option_strings}
        return {**words, **{action.dest: action for action in self._actions}}

    @property
    def _known(self) -> set[str]:
        return {name for name in self._actions_by_name if name.isidentifier()} - {"h", "help"}

    def _hint(self, word: str) -> str:
        near = difflib.get_close_matches(word.replace("-", "_"), sorted(self._known), 1)
        return f" Did you mean {near[0]}?" if near else ""


def parse(argv: list[str], given: Mapping[str, Any] | None = None) -> Options:
    """Parse `--config FILE.yaml` and flags: flags override the file, and the file overrides the defaults.

    Reports which of the given options have no effect.

    Arguments:
        given: further options by name; they override the file.

    Raises:
        UserError: an unknown option or key, an invalid value, or an option that would do nothing or something other
            than it says.
    """
    argv = [word for item in argv for word in (item.split("=", 1) if item.startswith("--config=") else [item])]
    parser = Parser(KINDS, prog="qlora-rm train", allow_abbrev=False)
    typed: set[str] = set()
    if "--config" in argv:
        where = argv.index("--config")
        if where + 1 == len(argv):
            raise UserError("--config needs the path of a YAML file.")
        from_file = parser.read_file(argv[where + 1])
        typed |= from_file.keys()
        parser.set_defaults_with_config(**from_file)
        argv = argv[:where] + argv[where + 2 :]
    if given:
        from_caller = parser.checked(given, "options")
        typed |= from_caller.keys()
        parser.set_defaults_with_config(**from_caller)
    try:
        namespace, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.error(f"unknown option {unknown[0]}")
        typed |= parser.named_in(argv)
        notes = check_options(LIBRARY | PROJECT, vars(namespace), DEFAULTS, typed)
        require_shape_of_adapter(vars(namespace), typed)
        options = Options(*parser.parse_args_into_dataclasses(argv))
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    require_optimizer(options.training)
    require_schedule(options.training)
    say(*notes)
    return replace(options, max_length_given="max_length" in typed)
