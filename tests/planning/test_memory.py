"""The arithmetic of a rank's memory: its laws, and the constants it shares with the launch configurations."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_rm.errors import UserError
from qlora_rm.planning import memory as arithmetic
from qlora_rm.planning.engines import CARDS_PER_NODE, Engines
from qlora_rm.planning.gpus import CARDS, card_named
from qlora_rm.planning.memory import Engine, Memory, Setting, host, memory
from qlora_rm.planning.rehearsal import Step
from qlora_rm.planning.skeleton import Weights

ROOT = Path(__file__).resolve().parents[2]
SHARDING = [engine for engine in get_args(Engine) if engine.startswith("zero")]
sizes = st.integers(10**6, 10**12)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Weights, Step]:
    packed, plain, trainable = draw(sizes), draw(sizes), draw(st.integers(1000, 10**9))
    largest = draw(st.integers(1, packed + plain))
    weights = Weights(packed, packed // 30, plain, 4 * trainable, largest, 2 * packed, trainable, 2 * packed, largest)
    gradients = draw(st.integers(0, 4 * trainable))
    return weights, Step(draw(sizes), draw(sizes) + gradients, gradients)


def setting(engine: Engine, ranks: int, accumulation: int = 2) -> Setting:
    return Setting(engine, ranks, 1, accumulation, True, Engines().hpz(engine, ranks))


@given(cases(), st.sampled_from(get_args(Engine)), st.integers(1, 64), st.integers(1, 4))
def test_the_parts_make_the_total(case, engine: Engine, ranks: int, accumulation: int) -> None:
    found = memory(*case, setting(engine, ranks, accumulation), CARDS["80"])
    assert found.total == sum(getattr(found, name) for name in Memory.__dataclass_fields__)
    assert min(vars(found).values()) >= 0


@given(cases(), st.sampled_from(SHARDING), st.integers(2, 64), st.integers(0, 64))
def test_more_cards_never_need_more_memory_each(case, engine: Engine, ranks: int, more: int) -> None:
    """Within one machine, and from two on; a second one brings a second copy of the shards."""
    few, many = setting(engine, ranks), setting(engine, ranks + more)
    if (few.nodes > 1) == (many.nodes > 1):
        assert memory(*case, many, CARDS["24"]).total <= memory(*case, few, CARDS["24"]).total


@given(cases(), st.integers(2, 8))
def test_each_stage_holds_less_at_rest(case, ranks: int) -> None:
    at_rest = [
        sum(getattr(memory(*case, setting(engine, ranks), CARDS["80"]), name) for name in ("weights", "gradients", "optimizer"))
        for engine in ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
    ]  # fmt: skip
    assert at_rest == sorted(at_rest, reverse=True)
    assert host(case[0], setting("zero3_offload", ranks)) * ranks >= case[0].packed + case[0].plain


@given(cases())
def test_sharded_weights_are_a_part_each_and_scales_whole(case) -> None:
    weights = replace(case[0], packed=8 * case[0].packed, plain=8 * case[0].plain)
    found = memory(weights, case[1], setting("zero3", 8), CARDS["80"])
    assert found.weights - weights.scales == (weights.packed + weights.plain) // 8


def test_buckets_are_those_of_the_launch_configurations() -> None:
    for path in (ROOT / "ds_configs").glob("*.json"):
        if not path.stem.startswith("cpu_"):
            zero = json.loads(path.read_text())["zero_optimization"]
            assert zero["reduce_bucket_size"] == arithmetic.REDUCE_BUCKET
            assert zero.get("stage3_prefetch_bucket_size", arithmetic.PREFETCH) == arithmetic.PREFETCH
            assert zero.get("stage3_max_reuse_distance", arithmetic.REUSE_DISTANCE) == arithmetic.REUSE_DISTANCE
    nodes = json.loads((ROOT / "ds_configs" / "multi_node_zero3.json").read_text())["zero_optimization"]
    assert nodes["zero_hpz_partition_size"] == CARDS_PER_NODE


@pytest.mark.parametrize(
    ("word", "gb", "cuda"), [("24", 24, True), ("80GB", 80, True), ("40", 40, True), ("cpu:64", 64, False)]
)
def test_cards_by_name(word: str, gb: int, cuda: bool) -> None:
    card = card_named(word)
    assert (card.memory, card.is_cuda) == (gb * 1e9, cuda)


@pytest.mark.parametrize("word", ["cpu", "big", "-1", "0", "cpu:"])
def test_no_such_card(word: str) -> None:
    with pytest.raises(UserError, match="give its memory in GB"):
        card_named(word)
