"""The engines a run can be planned for, and why the others cannot."""

from dataclasses import dataclass

from qlora_rm.config import Quantization
from qlora_rm.errors import UserError
from qlora_rm.planning.memory import Engine

CARDS_PER_NODE = 8
"""The number that `ds_configs/multi_node_zero3.json` is written for."""


@dataclass(frozen=True)
class Engines:
    """The engines to choose from.

    Attributes:
        cuda: whether the run uses GPUs; otherwise a host's processors.
        per_node: ranks on a machine, beyond which there are several machines; None where all ranks are on one.
        quantization: of the backbone.
    """

    cuda: bool = True
    per_node: int | None = CARDS_PER_NODE
    quantization: Quantization = "4bit"

    def of(self, ranks: int) -> list[Engine]:
        """Engines with a launch configuration for this many ranks, whose run the train command accepts."""
        return [engine for engine in _for_ranks(ranks) if self.refusal(engine, ranks) is None]

    def hpz(self, engine: Engine, ranks: int) -> int:
        """The `hpz` of the launch configuration (see `Setting`)."""
        return self.per_node if self.per_node and ranks > self.per_node and engine == "zero3" else 1

    def require(self, engine: Engine | None, ranks: int) -> None:
        """Raise a `UserError` where no run can be planned: under `engine`, or, without one, under any."""
        why = [self.refusal(name, ranks) for name in ([engine] if engine else _for_ranks(ranks))]
        if all(why):
            raise UserError(" ".join(dict.fromkeys(map(str, why))))

    def refusal(self, engine: Engine, ranks: int) -> str | None:
        """Return why a run cannot be planned, with a remedy; None where it can."""
        if self.per_node and ranks > self.per_node:
            if ranks % self.per_node:
                fewer = ranks // self.per_node * self.per_node
                return (
                    f"{ranks} cards do not make whole machines of {self.per_node}, as more than {self.per_node} are planned: "
                    f"give {fewer} or {fewer + self.per_node}."
                )
            if engine != "zero3":
                return "For several machines there is a launch configuration of ZeRO-3 alone: use --engine zero3."
        if engine == "zero3_offload" and not self.cuda:
            return (
                "zero3_offload moves weights from cards to the host's memory, where a CPU has them: use --engine zero3."
            )
        if engine.startswith("zero3") and self.quantization == "8bit":
            return (
                "ZeRO-3 shards no 8-bit weights, of which bitsandbytes keeps a whole copy on every rank: use --quantization "
                "4bit."
            )
        return None


def _for_ranks(ranks: int) -> tuple[Engine, ...]:
    return ("ddp", "zero2", "zero3", "zero3_offload") if ranks > 1 else ("single",)
