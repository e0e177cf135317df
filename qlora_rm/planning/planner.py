"""Find the fastest setting that fits: sort all candidates by a stated cost, and take the first that fits."""

from collections.abc import Callable, Iterator
from copy import copy

import torch
from transformers import PretrainedConfig

from qlora_rm.config import AdapterConfig, BackboneConfig
from qlora_rm.errors import UserError
from qlora_rm.planning.engines import CARDS_PER_NODE, Engines
from qlora_rm.planning.gpus import Card
from qlora_rm.planning.memory import Engine, Memory, Setting, memory
from qlora_rm.planning.rehearsal import Rehearsal, Step
from qlora_rm.planning.skeleton import backbone_of, build, weigh
from qlora_rm.planning.workload import Layout, Workload

MOST_PAIRS = 32
"""Comparisons in the largest micro-batch that is planned."""
MORE_RANKS = (2, 4, 8, 16, 32, 64)
USEFUL = 0.45
"""Share of a GPU's peak rate that products of a training step reach. It is the same for all candidates."""


class Planner:
    """Plans settings for a backbone, its adapter and its data.

    Arguments:
        config: the backbone's.
        workload: from a layout to the tokens of micro-batches.
        cuda: plan for GPUs; otherwise for a host's processors.
        pairs_per_step: comparisons in an optimizer step over all ranks.
        per_node: see `Engines`.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        backbone: BackboneConfig,
        adapter: AdapterConfig,
        dtype: torch.dtype,
        workload: Callable[[Layout], Workload],
        *,
        cuda: bool,
        pairs_per_step: int = 64,
        per_node: int | None = CARDS_PER_NODE,
        trust_remote_code: bool = False,
    ):
        model = build(config, backbone, adapter, dtype, trust_remote_code=trust_remote_code)
        self.weights = weigh(model, dtype)
        self.layout = Layout.of(backbone_of(model), backbone, cuda=cuda)
        self.workload = workload(self.layout)
        self.engines = Engines(cuda, per_node, backbone.quantization)
        self.pairs_per_step = pairs_per_step
        self.rehearsal = Rehearsal(model, dtype, self.layout.kernel)

    def step(self, setting: Setting) -> Step:
        """Memory of a micro-batch.

        Rehearsed for one comparison and for `MOST_PAIRS`. Every storage grows linearly with rows, so the peak, a
        maximum of straight lines, is on or below the line between the two. If row lengths differ, the batch itself is
        rehearsed.
        """
        few, many = self.workload.batch(1), self.workload.batch(MOST_PAIRS)
        batch = self.workload.batch(setting.pairs)
        accumulates = setting.engine != "single" or setting.accumulation > 1
        if not (few.length == many.length == batch.length and few.packed == many.packed == batch.packed):
            return self.rehearsal.step(batch, checkpointing=setting.checkpointing, accumulates=accumulates)
        low, high = (
            self.rehearsal.step(end, checkpointing=setting.checkpointing, accumulates=accumulates)
            for end in (few, many)
        )
        return low.towards(high, (batch.rows - few.rows) / (many.rows - few.rows))

    def memory(self, setting: Setting, card: Card) -> Memory:
        return memory(self.weights, self.step(setting), setting, card)

    def fits(self, setting: Setting, card: Card) -> bool:
        """Whether the setting fits. If the weights alone do not, nothing is rehearsed."""
        alone = memory(self.weights, Step(0, 0, 0), setting, card).total
        return alone <= card.memory and self.memory(setting, card).total <= card.memory

    def candidates(self, card: Card, ranks: int, engine: Engine | None = None) -> list[Setting]:
        """All settings of `ranks` ranks (with one engine, if it is given), the fastest first."""
        return sorted(self._candidates(ranks, engine), key=lambda setting: self.cost(setting, card))

    def _candidates(self, ranks: int, engine: Engine | None) -> Iterator[Setting]:
        for name in [engine] if engine else self.engines.of(ranks):
            hpz = self.engines.hpz(name, ranks)
            for pairs, accumulation in shares(self.pairs_per_step, ranks):
                for checkpointing in (False, True):
                    yield Setting(name, ranks, pairs, accumulation, checkpointing, hpz)

    def fastest(self, card: Card, ranks: int, engine: Engine | None = None) -> Setting | None:
        """The first candidate that fits, or None."""
        return next((s for s in self.candidates(card, ranks, engine) if self.fits(s, card)), None)

    def leanest(self, card: Card, ranks: int, engine: Engine | None = None) -> Setting:
        """The candidate that takes the least memory, whether it fits or not; it has one comparison in a micro-batch."""
        small = [s for s in self._candidates(ranks, engine) if s.pairs == 1]
        return min(small, key=lambda setting: self.memory(setting, card).total)

    def ranks_needed(self, card: Card, more_than: int) -> Setting | None:
        """The fastest setting on the fewest GPUs, more than `more_than`, on which any fits."""
        return next((s for n in MORE_RANKS if n > more_than for s in [self.fastest(card, n)] if s), None)

    def cut(self, length: int) -> "Planner":
        """The same planner for sequences of at most `length` tokens."""
        shorter = copy(self)
        shorter.workload = self.workload.cut(length)
        return shorter

    def cost(self, setting: Setting, card: Card) -> float:
        """Seconds a comparison, up to a factor that all candidates share; the key that orders settings.

        Products: 2 operations a token and active weight in the forward pass, and as many in backward (frozen weights
        get no gradient). Checkpointing repeats the forward pass.
        Unpacking: each pass reads packed weights, then writes and reads them in 16 bit, however many tokens there are.
        Communication: gradients once an optimizer step (twice their size, by ring reduction). Under ZeRO-3 also all
        packed weights once a pass, over the link between GPUs, or with offload over the slower link to the host.
        """
        passes = 3 if setting.checkpointing else 2
        weights, batch = self.weights, self.workload.batch(setting.pairs)
        tokens = batch.rows * batch.length
        products = passes * 2 * tokens * weights.active / (card.tflops * 1e12 * USEFUL)
        unpacking = passes * 9 * weights.packed / (card.bandwidth * 1e9)
        others = (setting.ranks - 1) / setting.ranks
        link = min(card.link, 25) if setting.nodes > 1 else card.link
        gathering = passes * others * weights.packed / (link * 1e9) if setting.stage == 3 else 0.0
        if setting.engine == "zero3_offload":
            gathering += passes * weights.packed / setting.ranks / 20e9
        reduction = 2 * others * 4 * weights.trainable / (link * 1e9) / setting.accumulation
        bookkeeping = 1e-3 * setting.stage  # breaks ties in favour of the engine that does less
        return (products + unpacking + gathering + reduction + bookkeeping) / (setting.pairs * setting.ranks)


def shares(pairs_per_step: int, ranks: int) -> Iterator[tuple[int, int]]:
    """All ways to split an optimizer step exactly over the ranks: comparisons in a micro-batch, and accumulation."""
    own, left = divmod(pairs_per_step, ranks)
    return ((n, own // n) for n in range(min(own, MOST_PAIRS), 0, -1) if left == own % n == 0)


def require_shares(pairs_per_step: int, ranks: int) -> None:
    """Raise a `UserError` where the ranks cannot take equal shares of an optimizer step."""
    if pairs_per_step % ranks:
        around = {n for n in (pairs_per_step // ranks * ranks, -(-pairs_per_step // ranks) * ranks) if n}
        raise UserError(
            f"--pairs_per_step {pairs_per_step}: {ranks} cards cannot take equal shares of it. Give a multiple of {ranks}, as "
            f"{' or '.join(map(str, sorted(around)))}."
        )
