"""Check before weights are loaded whether the requested run fits the available memory."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from qlora_rm.backbone.adapter import read_adapter_config
from qlora_rm.backbone.host import free_memory
from qlora_rm.backbone.load import read_model_config
from qlora_rm.config import AdapterConfig, BackboneConfig
from qlora_rm.errors import UserError, first_line
from qlora_rm.planning.engines import CARDS_PER_NODE
from qlora_rm.planning.gpus import CARDS, GB, Card, processors
from qlora_rm.planning.launch import door_options
from qlora_rm.planning.memory import Setting
from qlora_rm.planning.planner import Planner
from qlora_rm.planning.workload import Workload

SHORTEST = 128
"""Tokens below which no shorter `--max_length` is proposed."""


def memory_warning(
    backbone: BackboneConfig,
    adapter: AdapterConfig,
    dtype: torch.dtype,
    rows: Iterable[Mapping[str, Any]],
    setting: Setting,
    *,
    ranks_here: int,
    trust_remote_code: bool = False,
    card: Card | None = None,
) -> str | None:
    """None where the run fits; otherwise its needs, the free memory, and the nearest setting that fits.

    Arguments:
        rows: the training comparisons, tokenized (columns of `preferences.load_preferences`).
        setting: the requested setting.
        ranks_here: processes on this host, which share its memory where there is no GPU.
        card: the available device. Default: this process's GPU, or the host's free memory.
    """
    card = card or card_at_hand(ranks_here)
    try:
        planner = Planner(
            read_model_config(str(backbone.model_name_or_path), backbone.model_revision, trust_remote_code),
            backbone,
            taken_from_adapter(adapter),
            dtype,
            partial(Workload.measured, rows),
            cuda=card.is_cuda,
            pairs_per_step=setting.pairs * setting.ranks * setting.accumulation,
            per_node=ranks_on_a_machine(setting.ranks, ranks_here, card),
            trust_remote_code=trust_remote_code,
        )
        need = planner.memory(setting, card)
    except UserError as error:
        if not adapter.adapter:
            raise
        return f"memory: not planned for this adapter ({first_line(error)[:100]})"  # PEFT ignores unmatched names
    except Exception as error:  # code that fails without numbers is no reason not to train
        return f"memory: not planned for this backbone ({type(error).__name__}: {first_line(error)[:100]})"
    if need.total <= card.memory:
        return None
    largest = sorted(vars(need).items(), key=lambda term: -term[1])[:3]
    terms = ", ".join(f"{name} {size / GB:.1f}" for name, size in largest)
    return (
        f"memory: a process of this run needs about {need.total / GB:.1f} GB ({terms}), and {card.memory / GB:.1f} GB are "
        f"free. {nearest(planner, setting, card)}"
    )


def nearest(planner: Planner, asked: Setting, card: Card) -> str:
    """The setting that fits with the least change.

    It tries the micro-batch and checkpointing, the engine, the length, and the number of GPUs, in this order.
    """
    if same := planner.fastest(card, asked.ranks, asked.engine):
        return f"This fits: {in_words(same)}."
    if other := planner.fastest(card, asked.ranks):
        return (
            f"This fits: {in_words(other)}, launched with the configuration of accelerate_configs/ for {other.engine}."
        )
    length = planner.workload.longest // 2
    while length >= SHORTEST:
        if shorter := planner.cut(length).fastest(card, asked.ranks):
            return f"This fits: --max_length {length} {in_words(shorter)}."
        length //= 2
    if card.is_cuda and (more := planner.ranks_needed(card, asked.ranks)):
        return f"It fits on {more.ranks} such cards: {in_words(more)}."
    return "No setting fits: take a smaller backbone or more memory."


def ranks_on_a_machine(ranks: int, ranks_here: int, card: Card) -> int | None:
    """Ranks on a machine as launched. On a single machine the run may use more GPUs than were launched."""
    if ranks > ranks_here:
        return ranks_here
    return max(ranks, CARDS_PER_NODE) if card.is_cuda else None


def in_words(setting: Setting) -> str:
    """The options of the train command that give a setting."""
    return " ".join(f"--{name} {value}" for name, value in door_options(setting).items())


def card_at_hand(ranks_here: int) -> Card:
    """This process's GPU with its free memory; without a GPU, a share of the host's free memory."""
    if not torch.cuda.is_available():
        return processors(free_memory() / ranks_here)
    free, total = torch.cuda.mem_get_info()
    like = min(CARDS.values(), key=lambda card: abs(card.memory - total))
    return replace(like, name=torch.cuda.get_device_name(), memory=float(free))


def taken_from_adapter(adapter: AdapterConfig) -> AdapterConfig:
    """The adapter configuration of the run; when it continues from an adapter, the shape of that adapter."""
    if not adapter.adapter:
        return adapter
    saved = read_adapter_config(adapter.adapter)
    return AdapterConfig(
        lora_r=saved["r"],
        lora_target_modules=saved.get("target_modules") or None,
        lora_layers=saved.get("layers_to_transform"),
        use_dora=bool(saved.get("use_dora")),
    )
