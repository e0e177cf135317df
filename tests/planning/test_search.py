"""The fastest setting that fits, the command that launches it, and the message if the requested run does not fit."""

import random
import shlex
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from qlora_rm.config import AdapterConfig, BackboneConfig
from qlora_rm.planning.engines import Engines
from qlora_rm.planning.fit_check import in_words, memory_warning, nearest, ranks_on_a_machine
from qlora_rm.planning.gpus import CARDS, Card, processors
from qlora_rm.planning.launch import launch_line
from qlora_rm.planning.memory import Setting
from qlora_rm.planning.planner import MORE_RANKS, MOST_PAIRS, Planner
from qlora_rm.planning.workload import Workload
from qlora_rm.training.arguments import parse
from tests.models_for_tests import save_backbone
from tests.planning.test_rehearsal import SHAPES
from tests.tokenizers_for_tests import small_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def planner(cuda: bool = True, **backbone) -> Planner:
    dtype = torch.bfloat16 if cuda else torch.float32
    workload = partial(Workload.assumed, 512, 0.75, 2)
    config = AutoConfig.for_model(**SHAPES["llama"])
    return Planner(config, BackboneConfig(**backbone), AdapterConfig(), dtype, workload, cuda=cuda)


LLAMA = planner()
SMALL = replace(CARDS["24"], context=1e6, communication=1e6)


@pytest.mark.slow
@given(st.floats(3, 9), st.sampled_from([1, 2, 8, 16]))
@settings(max_examples=12)
def test_the_fastest_fits_and_nothing_faster_does(digits: float, ranks: int) -> None:
    card = replace(SMALL, memory=10**digits * 10)
    found = LLAMA.fastest(card, ranks)
    for candidate in LLAMA.candidates(card, ranks):
        if candidate == found:
            assert LLAMA.memory(candidate, card).total <= card.memory
            break
        assert LLAMA.memory(candidate, card).total > card.memory
    else:
        assert found is None


def test_a_faster_setting_is_one_that_computes_less() -> None:
    plain, saved = (Setting("single", 1, 4, 16, on) for on in (False, True))
    one, four = (Setting("single", 1, pairs, 64 // pairs, True) for pairs in (1, 4))
    card = CARDS["80"]
    assert LLAMA.cost(plain, card) < LLAMA.cost(saved, card)
    assert LLAMA.cost(four, card) < LLAMA.cost(one, card)
    assert LLAMA.cost(Setting("ddp", 8, 1, 8, True), card) < LLAMA.cost(Setting("zero3", 8, 1, 8, True), card)
    assert LLAMA.cost(Setting("zero3", 8, 1, 8, True), card) < LLAMA.cost(Setting("zero3_offload", 8, 1, 8, True), card)


@pytest.mark.parametrize("setting", [
    *(Setting(engine, 8 if engine != "single" else 1, 4, 2, True) for engine in ("single", "ddp", "zero2", "zero3", "zero3_offload")),
    Setting("zero3", 16, 1, 4, False, hpz=8),
], ids=lambda setting: f"{setting.engine}-{setting.ranks}")  # fmt: skip
@pytest.mark.parametrize("cuda", [True, False])
def test_the_line_is_one_that_accelerate_and_the_door_read(setting: Setting, cuda: bool, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    if not cuda and (setting.ranks > 8 or setting.engine == "zero3_offload"):
        pytest.skip("no such configuration for CPUs")
    options = {
        "model_name_or_path": "a b",
        "dataset": ["x.jsonl", "y.jsonl"],
        "lora_target_modules": ["q_proj"],
        "bf16": False,
    }
    words = shlex.split(launch_line(setting, options, cuda=cuda))
    words = words[words.index("accelerate") :]  # environment variables come first
    assert words[:2] == ["accelerate", "launch"]
    read = launch_command_parser().parse_args(words[2:])
    assert (read.module, read.training_script) == (True, "qlora_rm.train")
    assert (read.num_processes or 1) == setting.ranks
    if read.config_file:
        assert (ROOT / read.config_file).exists()
    told = parse(read.training_script_args)
    assert told.backbone.model_name_or_path == "a b"
    assert told.data.dataset == ["x.jsonl", "y.jsonl"]
    assert told.adapter.lora_target_modules == ["q_proj"]
    assert told.training.per_device_train_batch_size == setting.pairs
    assert told.training.gradient_accumulation_steps == setting.accumulation
    assert told.training.gradient_checkpointing is setting.checkpointing
    assert setting.engine.startswith(told.training.engine)


def test_every_engine_that_is_searched_has_a_configuration() -> None:
    for cuda, per_node in ((True, 8), (False, None)):
        for ranks in (1, *MORE_RANKS):
            for engine in Engines(cuda, per_node).of(ranks):
                words = shlex.split(launch_line(Setting(engine, ranks, 1, 1, True), {}, cuda=cuda))
                named = [ROOT / words[i + 1] for i, word in enumerate(words) if word == "--config_file"]
                assert all(file.exists() for file in named)
                assert len(named) == (cuda or ranks > 1)


@pytest.mark.long
@pytest.mark.slow
def test_weights_are_not_planned_away_from_a_cpu_into_its_own_memory() -> None:
    on_cpu = planner(cuda=False)
    assert on_cpu.engines.of(2) == ["ddp", "zero2", "zero3"]
    host = processors(1e9)
    assert "zero3_offload" not in {setting.engine for setting in on_cpu.candidates(host, 2)}
    two = on_cpu.leanest(host, 2)
    assert two.engine == "zero3"
    too_little = replace(host, memory=on_cpu.memory(two, host).total - 1)
    assert "zero3_offload" not in nearest(on_cpu, Setting("ddp", 2, 32, 1, False), too_little)


@given(st.integers(1, 200), st.integers(1, 16))
def test_a_candidate_makes_the_very_step_that_was_asked_for(pairs_per_step: int, ranks: int) -> None:
    """In as many ways as there are; in none if the ranks cannot take equal shares."""
    asking = copy(LLAMA)
    asking.pairs_per_step = pairs_per_step
    found = {(s.pairs, s.accumulation) for s in asking.candidates(SMALL, ranks, "ddp")}
    assert all(pairs * accumulation * ranks == pairs_per_step for pairs, accumulation in found)
    assert len(found) == sum(pairs_per_step % (n * ranks) == 0 for n in range(1, MOST_PAIRS + 1))


@pytest.mark.slow
def test_several_machines_are_planned_as_the_launch_configuration_has_them() -> None:
    """DeepSpeed shards the second copy among 8 ranks, and stops if the ranks are no multiple of 8."""
    assert [Engines().of(n) for n in (9, 12, 16, 24)] == [[], [], ["zero3"], ["zero3"]]
    sixteen = LLAMA.leanest(SMALL, 16)
    assert (sixteen.hpz, sixteen.nodes) == (8, 2)
    one_copy = LLAMA.memory(replace(sixteen, hpz=1), SMALL).weights
    assert LLAMA.memory(sixteen, SMALL).weights > one_copy
    assert LLAMA.leanest(SMALL, 8).nodes == 1


def test_machines_of_a_run_are_those_it_was_launched_on() -> None:
    assert ranks_on_a_machine(12, 4, SMALL) == 4, "three of four"
    assert ranks_on_a_machine(1, 1, SMALL) == 8, "one card of a machine that may have more"
    assert ranks_on_a_machine(16, 16, SMALL) == 16
    assert ranks_on_a_machine(16, 16, processors(1e9)) is None, "a host's processes are on that host"
    fours = copy(LLAMA)
    fours.engines = Engines(per_node=4)
    assert fours.engines.of(12) == fours.engines.of(8) == ["zero3"] and "ddp" in fours.engines.of(4)
    assert {(s.hpz, s.nodes) for s in fours.candidates(SMALL, 8)} == {(4, 2)}


@pytest.mark.slow
def test_8_bit_weights_are_planned_for_engines_that_leave_them_whole() -> None:
    """ZeRO-3 does not shard them, so that it would save nothing."""
    eight = planner(quantization="8bit")
    assert eight.engines.of(8) == ["ddp", "zero2"] and LLAMA.engines.of(8) == ["ddp", "zero2", "zero3", "zero3_offload"]
    assert {setting.engine for setting in eight.candidates(SMALL, 8)} == {"ddp", "zero2"}
    small = replace(SMALL, memory=eight.memory(eight.leanest(SMALL, 8), SMALL).total - 1)
    assert eight.fastest(small, 8) is None and eight.ranks_needed(small, 8) is None


class TestWorkload:
    def test_assumed_and_measured_agree(self) -> None:
        prompt, endings = list(range(5, 389)), [[1] * 128, [2] * 128]
        row = {"prompt_ids": prompt, "response_ids": endings, "length": 512, "tokens": 640}
        measured = Workload.measured([row] * 3, LLAMA.layout)
        for pairs in (1, 2, 8):
            assert measured.batch(pairs) == LLAMA.workload.batch(pairs)
        assert measured.longest == LLAMA.workload.longest == 512

    def test_the_heaviest_are_taken(self) -> None:
        draw = random.Random(0)
        rows = [
            {"prompt_ids": [7] * n, "response_ids": [[1] * 4, [2] * 4], "length": n + 4, "tokens": n + 8}
            for n in draw.sample(range(10, 2000), 600)
        ]  # fmt: skip
        workload = Workload.measured(iter(rows), replace(LLAMA.layout, row_multiple=1))
        heaviest = sorted(row["tokens"] for row in rows)[-2:]
        assert workload.longest == max(row["length"] for row in rows)
        assert (workload.batch(2).rows, workload.batch(2).length) == (2, heaviest[-1])

    def test_cut(self) -> None:
        assert LLAMA.workload.cut(256).batch(2).length < LLAMA.workload.batch(2).length
        assert LLAMA.workload.cut(4096).batch(2) == LLAMA.workload.batch(2)

    def test_padded_without_sharing_and_with_a_forest_that_does_not_pay(self) -> None:
        assert not planner(share_prefix="false").workload.batch(2).packed
        layout = replace(LLAMA.layout, width=256, row_multiple=1)
        assert not Workload.assumed(2048, 0.4, 2, layout).batch(1).packed


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> BackboneConfig:
    folder = save_backbone(tmp_path_factory.mktemp("backbone"), "llama", small_tokenizer())
    return BackboneConfig(model_name_or_path=folder)


class TestWarning:
    rows = [{"prompt_ids": [5] * 300, "response_ids": [[1] * 100, [2] * 100], "length": 400, "tokens": 500}] * 4

    def warn(self, backbone: BackboneConfig, asked: Setting, card: Card | None) -> str | None:
        return memory_warning(backbone, AdapterConfig(), torch.float32, self.rows, asked, ranks_here=1, card=card)

    @pytest.mark.slow
    def test_none_where_it_fits(self, backbone: BackboneConfig) -> None:
        assert self.warn(backbone, Setting("single", 1, 2, 1, False), None) is None

    @pytest.mark.slow
    def test_what_it_proposes_fits(self, backbone: BackboneConfig) -> None:
        asked = Setting("single", 1, 32, 1, False)
        card = replace(processors(30e6), context=1e6)
        said = self.warn(backbone, asked, card)
        assert said is not None and said.startswith("memory: a process of this run needs about ")
        words = said.rpartition("This fits: ")[2].rstrip(".").split()
        told = parse(["--bf16", "False", *words]).training
        proposed = Setting(
            "single", 1, told.per_device_train_batch_size, told.gradient_accumulation_steps, told.gradient_checkpointing
        )
        assert proposed.pairs * proposed.accumulation == 32
        assert in_words(proposed) == " ".join(words)
        assert self.warn(backbone, proposed, card) is None

    @pytest.mark.slow
    def test_what_it_proposes_is_the_batch_that_was_asked_for(self, backbone: BackboneConfig) -> None:
        said = self.warn(backbone, Setting("single", 1, 21, 1, False), replace(processors(20e6), context=1e6))
        assert said is not None and "This fits: --engine single --per_device_train_batch_size" in said
        told = parse(["--bf16", "False", *said.rpartition("This fits: ")[2].rstrip(".").split()]).training
        assert told.per_device_train_batch_size * told.gradient_accumulation_steps == 21

    @pytest.mark.slow
    def test_what_no_micro_batch_mends(self, backbone: BackboneConfig) -> None:
        said = self.warn(backbone, Setting("single", 1, 1, 1, True), replace(processors(1e5), context=0.0))
        assert said is not None and said.endswith("No setting fits: take a smaller backbone or more memory.")

    @pytest.mark.long
    @pytest.mark.slow
    def test_a_shorter_length_and_more_cards(self) -> None:
        asked = Setting("single", 1, 1, 1, True)
        half = LLAMA.cut(256).memory(LLAMA.leanest(SMALL, 1), SMALL).total
        card = replace(SMALL, memory=half)
        assert not LLAMA.fits(asked, card)
        assert nearest(LLAMA, asked, card).startswith("This fits: --max_length 256 --engine single ")
        heavy = copy(LLAMA)
        heavy.weights = replace(LLAMA.weights, packed=8 * 10**9, largest=10**8)
        assert nearest(heavy, asked, replace(SMALL, memory=6e9)).startswith("It fits on 2 such cards: --engine zero3 ")
        assert nearest(heavy, asked, replace(SMALL, memory=5e8)).startswith("No setting fits")
