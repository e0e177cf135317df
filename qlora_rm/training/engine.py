"""The engine a run asked for, the engine it got, and an error when they differ."""

import importlib
import os
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from qlora_rm.console import say, verbosity
from qlora_rm.errors import UserError
from qlora_rm.training.arguments import TrainingConfig, asks_for_deepspeed


def quiet_deepspeed() -> None:
    """Hide, except under --verbose, what DeepSpeed 0.19 prints on every CPU rank after building its collectives.

    Remove once DeepSpeed logs it (`build_shm_op` in deepspeed/comm/torch.py).
    """
    if verbosity() != "verbose":
        module = importlib.import_module("deepspeed.comm.torch")  # the attribute deepspeed.comm.torch is torch itself
        vars(module)["print"] = lambda *_, **__: None


@dataclass(frozen=True)
class Engine:
    """The engine that runs the optimizer; `name` is single, ddp, or zero1 to zero3."""

    name: str
    world_size: int
    device: str

    def __str__(self) -> str:
        ranks = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return f"{self.name}, {ranks} on {self.device}"


def asked_engine(args: TrainingConfig) -> str:
    """Return the engine named by `--engine`, or else by the launcher's environment."""
    if args.engine != "auto":
        return args.engine
    if asks_for_deepspeed(args):
        plugin = args.deepspeed_plugin
        stage = plugin.zero_stage if plugin is not None else os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "?")
        return f"zero{stage}"
    return "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "single"


def launched_engine(args: TrainingConfig) -> Engine:
    """Return the engine that the process group was set up for; this needs no model."""
    state = args.distributed_state
    assert state is not None
    if state.distributed_type == DistributedType.DEEPSPEED:
        name = f"zero{args.deepspeed_plugin.zero_stage}"
    elif state.num_processes > 1:
        name = "ddp"
    else:
        name = "single" if int(os.environ.get("WORLD_SIZE", "1")) == 1 else "unsynchronized"
    return _engine(name, state.num_processes, args.device)


def engine_in_force(wrapped: Any, world_size: int, device: torch.device) -> Engine:
    """Return the engine of the prepared model itself, not of any configuration."""
    if isinstance(wrapped, deepspeed.DeepSpeedEngine):
        name = f"zero{wrapped.zero_optimization_stage()}"
    elif isinstance(wrapped, DistributedDataParallel):
        name = "ddp"
    else:
        name = "single" if world_size == 1 else "unsynchronized"
    return _engine(name, world_size, device)


def _engine(name: str, world_size: int, device: torch.device) -> Engine:
    return Engine(name, world_size, torch.cuda.get_device_name() if device.type == "cuda" else device.type)


def require_engine(args: TrainingConfig, engine: Engine) -> None:
    """Raise a `UserError` unless `engine` is the one asked for; launchers fall back silently.

    `accelerate launch --cpu` with a DeepSpeed configuration starts one plain process. Two CPU ranks without `use_cpu`
    each train alone.
    """
    asked = asked_engine(args)
    if engine.name != asked:
        raise UserError(
            f"The engine asked for is {asked}, the one in force is {engine}. Launch with the configuration of "
            "accelerate_configs/ that bears its name, or say --engine auto to take what the launcher gives."
        )


def any_process(condition: bool, device: torch.device) -> bool:
    """Whether `condition` holds in any process of the job. Collective: every process must call it."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return condition
    flag = torch.tensor(int(condition), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


class EngineCheck(TrainerCallback):
    """Callback that prints the engine once at the start of training, and stops if it is not the one asked for.

    It inspects the prepared model; `preflight.py` sees only the launch.
    """

    def __init__(self, precision: str):
        self.precision = precision
        self.trainer: Any = None  # set once the trainer exists

    def on_train_begin(self, args: TrainingConfig, state: Any, control: Any, **_: Any) -> None:  # type: ignore[override]
        wrapped = self.trainer.model_wrapped
        engine = engine_in_force(wrapped, self.trainer.accelerator.num_processes, args.device)
        require_engine(args, engine)
        if isinstance(wrapped, deepspeed.DeepSpeedEngine) and wrapped.gradient_clipping() != args.max_grad_norm:
            raise UserError(
                f"DeepSpeed clips gradients at {wrapped.gradient_clipping()}, --max_grad_norm says {args.max_grad_norm}: "
                'set "gradient_clipping": "auto" in the DeepSpeed configuration.'
            )
        say(f"engine: {engine}, {self.precision}; {self._batches(engine)}")

    def _batches(self, engine: Engine) -> str:
        """Return the layout of the batches: forests or padded.

        All processes must use the same one, because the order of the data depends on it (even loads).
        """
        shares = torch.tensor([float(self.trainer.shares_prefix)], device=self.trainer.args.device)
        sharing = int(self.trainer.accelerator.gather(shares).sum())
        if sharing == 0:
            return "padded batches"
        if sharing < engine.world_size:
            raise UserError(
                f"On {sharing} of {engine.world_size} processes prompts can be shared, on the others not: they would "
                "train on different data. Pass --share_prefix false."
            )
        return "forests, each shared prompt computed once"

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """At the first step, raise if most trainable weights got no gradient, which means a broken graph.

        DeepSpeed keeps its own gradients and is not checked.
        """
        if state.global_step > 0 or isinstance(self.trainer.model_wrapped, deepspeed.DeepSpeedEngine):
            return
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        missing = [name for name, p in trainable if p.grad is None]
        if len(missing) > len(trainable) / 2:
            raise RuntimeError(
                f"{len(missing)} of {len(trainable)} trainable weights got no gradient, first {missing[0]}"
            )
