"""The arithmetic of a rank's memory: one term a function, with its formula and its reason.

N is the number of ranks. Weights of an adapter (and of the head) are trained in fp32 with AdamW. Each weight costs 4
bytes, its gradient 4, and AdamW's two moments 8.
"""

import math
from dataclasses import dataclass
from typing import Literal

from qlora_rm.planning.gpus import Card
from qlora_rm.planning.rehearsal import Step
from qlora_rm.planning.skeleton import Weights

Engine = Literal["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload"]

FP32 = 4
ADAM = 8
REDUCE_BUCKET = 50_000_000
PREFETCH = 50_000_000
"""Elements, as `ds_configs/` sets them."""
REUSE_DISTANCE = 1_000_000_000
"""Elements, DeepSpeed's default (`stage3_max_reuse_distance`)."""


@dataclass(frozen=True)
class Setting:
    """The settings of a run.

    Attributes:
        pairs: comparisons in a micro-batch.
        accumulation: micro-batches in an optimizer step.
        hpz: under ZeRO-3, ranks that shard a second copy of the weights among them (`zero_hpz_partition_size`). With
            several machines these are the ranks of one machine; 1 without such copies.
    """

    engine: Engine
    ranks: int
    pairs: int
    accumulation: int
    checkpointing: bool
    hpz: int = 1

    @property
    def stage(self) -> int:
        return int(self.engine[4]) if self.engine.startswith("zero") else 0

    @property
    def nodes(self) -> int:
        return math.ceil(self.ranks / self.hpz) if self.hpz > 1 else 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the peak of a training step, by purpose; `total` is their sum.

    Attributes:
        weights: frozen weights at rest: packed ones, their scales, embeddings and norms.
        gathered: under ZeRO-3, unsharded weights of the layers in use.
        trained: adapter and head, and the copies of them that an engine keeps.
        gradients: of the trained weights.
        optimizer: AdamW's moments.
        buckets: communication buffers for gradients.
        activations: what a micro-batch keeps and computes with.
        runtime: memory of the device's libraries (assumed for GPUs, measured on CPUs).
    """

    weights: int
    gathered: int
    trained: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def memory(weights: Weights, step: Step, setting: Setting, card: Card) -> Memory:
    """Peak of a rank. `step` was rehearsed for the setting's micro-batch and checkpointing."""
    activations = step.peak - step.gradients
    return Memory(
        weights=frozen(weights, setting),
        gathered=gathered(weights, setting),
        trained=trained(weights, setting),
        gradients=gradients(weights, step, setting),
        optimizer=optimizer(weights, setting),
        buckets=buckets(weights, setting, card),
        activations=activations,
        runtime=card.runtime(setting.ranks) + round(card.fragmentation * activations),
    )


def frozen(weights: Weights, setting: Setting) -> int:
    """Frozen weights on a rank.

    ZeRO-3 leaves each rank 1/N of the packed and plain weights; with parameter offload it leaves none. The scales are
    not parameters, and stay. A second copy within each node (`zero_hpz_partition_size`) adds to that.
    """
    sharded = weights.packed + weights.plain
    if setting.stage < 3:
        return sharded + weights.scales
    if setting.engine == "zero3_offload":
        return weights.scales
    second = share(sharded, setting.hpz) if setting.hpz > 1 else 0
    return share(sharded, setting.ranks) + second + weights.scales


def gathered(weights: Weights, setting: Setting) -> int:
    """Weights that are unsharded at the peak under ZeRO-3; 0 otherwise.

    This is the larger of two: the largest layer (or the embedding), and what DeepSpeed keeps at the turn from forward
    to backward. It keeps weights that it will use again within the reuse distance, half on either side of the turn.
    Prefetched weights come on top. Packed weights count as elements of one byte.
    """
    if setting.stage < 3:
        return 0
    at_the_turn = min(weights.packed, REUSE_DISTANCE // 2)
    return min(weights.packed + weights.plain, max(weights.largest, at_the_turn) + PREFETCH)


def trained(weights: Weights, setting: Setting) -> int:
    """Trained weights on a rank: complete up to ZeRO-2, 1/N under ZeRO-3.

    ZeRO-1 and ZeRO-2 also keep an fp32 master copy of the rank's share, although the weights are fp32.
    """
    if setting.stage == 3:
        return share(weights.trained, setting.ranks)
    return weights.trained + (share(weights.trained, setting.ranks) if setting.stage else 0)


def gradients(weights: Weights, step: Step, setting: Setting) -> int:
    """Gradients on a rank: complete under one process and DDP, 1/N under ZeRO-2 and 3.

    In one process without accumulation, gradients appear while activations are freed. Only those alive at the peak
    count.
    """
    if setting.stage >= 2:
        return share(FP32 * weights.trainable, setting.ranks)
    come_and_go = setting.engine == "single" and setting.accumulation == 1
    return step.gradients if come_and_go else FP32 * weights.trainable


def optimizer(weights: Weights, setting: Setting) -> int:
    """Optimizer state on a rank: 1/N from ZeRO-1 on."""
    return share(ADAM * weights.trainable, setting.ranks if setting.stage else 1)


def buckets(weights: Weights, setting: Setting, card: Card) -> int:
    """Communication buffers on a rank.

    DDP copies all gradients into its buckets. ZeRO allocates full buckets however few gradients there are: two on GPUs
    for ZeRO-1 and 2, since communication overlaps, otherwise one. CPU ranks send gradients without buckets.
    """
    if setting.engine == "ddp":
        return FP32 * weights.trainable
    if not setting.stage or not card.is_cuda:
        return 0
    return FP32 * REDUCE_BUCKET * (1 if setting.stage == 3 else 2)


def loading(weights: Weights, setting: Setting) -> int:
    """Bytes on a rank when the last weight is read: all that stays, and a few 16-bit matrices not yet quantized."""
    return frozen(weights, setting) + 4 * weights.dense


def host(weights: Weights, setting: Setting) -> int:
    """Bytes of host memory a rank allocates: its share of the offloaded weights, pinned."""
    return share(weights.packed + weights.plain, setting.ranks) if setting.engine == "zero3_offload" else 0


def share(size: int, ranks: int) -> int:
    """A rank's part of an even split; the last part is padded."""
    return math.ceil(size / ranks)
