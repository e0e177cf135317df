"""Check of optimizer and schedule before anything is loaded: they must exist, and use the options given for them."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext

from qlora_rm.config import require
from qlora_rm.errors import UserError, first_line

STEPS_IN_BACKWARD = ("lomo", "adalomo")


class _Recorded(dict[str, str]):
    """A mapping that records which of its keys were read."""

    def __init__(self, *items: Any):
        super().__init__(*items)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> str:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:  # some optimizers read all items
        self.read.update(super().keys())
        return super().__iter__()


def require_optimizer(args: TrainingArguments) -> None:
    """Raise a `UserError` for an optimizer that cannot be created, or that ignores an option given for it."""
    name = str(getattr(args.optim, "value", args.optim))
    require(
        name not in STEPS_IN_BACKWARD,
        f"--optim {name} changes weights in each backward pass, so that --gradient_accumulation_steps and --max_grad_norm "
        "would do nothing. Use adamw_torch or an 8-bit or paged optimizer.",
    )
    given = _Recorded(_optim_args(args.optim_args))
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    context = OptimizerContext(args, None, {"lr": args.learning_rate}, adam, given)
    try:
        _, settings = _OPTIMIZER_HANDLERS[args.optim](context)
    except (ImportError, ValueError) as error:
        if name.startswith(("galore", "apollo")) and not isinstance(error, ImportError):
            if args.optim_target_modules:
                return  # creating it needs the model, which is not loaded yet
            raise UserError(f"--optim {name} needs --optim_target_modules: the linear layers it works on.") from error
        raise UserError(f"--optim {name}: {first_line(error)}") from error
    unread = [key for key in dict.keys(given) if key not in given.read]
    require(
        not unread, f"--optim_args {unread[0] if unread else ''} is not an argument of --optim {name}. Leave it out."
    )
    default = TrainingArguments.__dataclass_fields__
    for option, setting in (("adam_beta1", "betas"), ("adam_beta2", "betas"), ("adam_epsilon", "eps")):
        require(
            setting in settings or getattr(args, option) == default[option].default,
            f"--{option} {getattr(args, option)} has no effect: --optim {name} does not read it. Leave it out.",
        )


def _optim_args(text: str | None) -> dict[str, str]:
    pairs = [pair.split("=") for pair in (text or "").replace(" ", "").split(",") if pair]
    require(
        all(len(pair) == 2 for pair in pairs),
        f"--optim_args {text} is not of the form name=value,name=value.",
    )
    return dict(pairs)


def require_schedule(args: TrainingArguments) -> None:
    """Raise a `UserError` if the learning rate schedule lacks an argument, or does not take one that is given."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
        )
    except (TypeError, ValueError) as error:
        name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        raise UserError(
            f"--lr_scheduler_type {name} with --lr_scheduler_kwargs {args.lr_scheduler_kwargs}: {error}."
        ) from error
