"""Parameter-efficient QLoRA reward models for large backbones.

    from qlora_rm import RewardModel, train

`train` trains a model from options, `RewardModel` scores with one. Both load their libraries when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_rm.artifacts.load import RewardModel
    from qlora_rm.errors import UserError
    from qlora_rm.training.interface import train
    from qlora_rm.training.run import Outcome

__version__ = "0.1.0"
__all__ = ["Outcome", "RewardModel", "UserError", "train"]

_HOMES = {
    "Outcome": "qlora_rm.training.run",
    "RewardModel": "qlora_rm.artifacts.load",
    "UserError": "qlora_rm.errors",
    "train": "qlora_rm.training.interface",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for; `import qlora_rm` alone loads no library."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
