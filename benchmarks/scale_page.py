"""python -m benchmarks.scale_page [plan [SIZE ...]]

Write docs/scale.md from benchmarks/results/scale.json and memory_cpu.json. With `plan`, the planner first computes scale.json,
for all backbones or those named. That takes minutes, but no weights and no GPU.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_rm.config import AdapterConfig, BackboneConfig
from qlora_rm.planning.gpus import CARDS, LIBRARIES
from qlora_rm.planning.memory import Engine, Setting, memory
from qlora_rm.planning.planner import Planner
from qlora_rm.planning.published_shapes import PUBLISHED, published
from qlora_rm.planning.rehearsal import Step
from qlora_rm.planning.report import gb
from qlora_rm.planning.workload import Workload

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "scale.md"
SIZES = ("7B", "13B", "32B", "70B", "405B", "8x7B", "30B-A3B", "235B-A22B")
LENGTH, SHARE = 2048, 0.5
RANKS = 8
ENGINES: tuple[Engine, ...] = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
STATIC = ("weights", "gathered", "trained", "gradients", "optimizer", "buckets")


def planner(size: str, share_prefix: str = "auto") -> Planner:
    workload = partial(Workload.assumed, LENGTH, SHARE, 2)
    backbone = BackboneConfig(share_prefix=share_prefix)  # type: ignore[arg-type]
    return Planner(published(size), backbone, AdapterConfig(), torch.bfloat16, workload, cuda=True)


def plan(size: str) -> dict[str, Any]:
    """Return all figures of one backbone for the page. Sizes are in bytes."""
    shared, padded = planner(size), planner(size, "false")
    activations = {
        f"{name}, {'checkpointed' if checkpointing else 'all kept'}": vars(
            p.step(Setting("single", 1, 1, 2, checkpointing))
        )
        for name, p in (("shared", shared), ("padded", padded))
        for checkpointing in (False, True)
    }
    ranks = {
        engine: vars(memory(shared.weights, Step(0, 0, 0), Setting(engine, RANKS, 1, 8, True), CARDS["80"]))
        for engine in ENGINES
    }
    cards: dict[str, Any] = {}
    for name, card in CARDS.items():
        for count in (1, RANKS):
            fastest = shared.fastest(card, count)
            cards[f"{count} x {name}"] = {
                "setting": fastest and vars(fastest),
                "total": fastest and shared.memory(fastest, card).total,
            }
        more = shared.ranks_needed(card, RANKS) if cards[f"{RANKS} x {name}"]["setting"] is None else None
        cards[f"{RANKS} x {name}"]["needs"] = more and more.ranks
    return {"weights": vars(shared.weights), "activations": activations, "ranks": ranks, "cards": cards}


def render(scale: dict[str, Any], measured: dict[str, Any]) -> str:
    """Return the page's text."""
    runs = measured["runs"].values()
    ratios = [run["predicted"] / run["measured"]["training"] for run in runs]
    parts = [
        HEAD,
        "## Prediction and measurement\n\n"
        + MEASURED.format(
            machine=measured["machine"], runs=len(ratios), low=min(ratios), high=max(ratios), libraries=LIBRARIES / 1e6
        ),
        markdown(
            ("run", "backbone", "tokens, comparisons", "checkpointed", "predicted, MB", "measured, MB", "ratio"),
            [
                (name, r["run"]["shape"], f"{r['run']['length']} x {r['run']['pairs']}{'' if r['run']['share'] else ', padded'}",
                 "yes" if r["run"]["checkpointing"] else "no", f"{r['predicted']:,.0f}", f"{r['measured']['training']:,.0f}",
                 f"{r['predicted'] / r['measured']['training']:.3f}")
                for name, r in measured["runs"].items()
            ],
        ),
        "## Weights, GB\n\n" + WEIGHTS,
        markdown(
            ("backbone", "weights, billions", "at work on a token", "packed", "scales", "embeddings, norms", "adapter, head", "trained weights"),
            [
                (f"{size} ({PUBLISHED[size][0]})", f"{w['parameters'] / 1e9:.1f}", f"{w['active'] / 1e9:.1f}",
                 *(gb(w[term]) for term in ("packed", "scales", "plain", "trained")), f"{w['trainable'] / 1e6:.1f} M")
                for size, w in ((size, scale[size]["weights"]) for size in scale)
            ],
        ),
        f"## On each of {RANKS} ranks beside the activations, GB\n\n" + PER_RANK,
        markdown(
            ("backbone", *ENGINES),
            [(size, *(gb(sum(s["ranks"][engine][term] for term in STATIC)) for engine in ENGINES)) for size, s in scale.items()],
        ),
        "## Activations of one comparison, GB\n\n" + ACTIVATIONS,
        markdown(
            ("backbone", *next(iter(scale.values()))["activations"]),
            [(size, *(gb(step["peak"]) for step in s["activations"].values())) for size, s in scale.items()],
        ),
        "## What fits, and the fastest that does\n\n" + FITS,
        *(
            f"### {count} card{'s' if count > 1 else ''}\n\n"
            + markdown(("backbone", *(f"{card} GB" for card in CARDS)),
                       [(size, *(_cell(s["cards"][f"{count} x {card}"]) for card in CARDS)) for size, s in scale.items()])
            for count in (1, RANKS)
        ),
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _cell(found: dict[str, Any]) -> str:
    if found["setting"] is None:
        needs = found.get("needs")
        return f"no; from {needs} cards" if needs else "no"
    s = Setting(**found["setting"])
    return (
        f"{s.engine}, {s.pairs} x {s.accumulation}{', checkpointed' if s.checkpointing else ''}: {gb(found['total'])}"
    )


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ("---",) * len(header), *rows])


HEAD = """# What a run needs of memory

Written by `python -m benchmarks.scale_page` from `benchmarks/results/`. `qlora-rm plan` says the same of any backbone
from its configuration, and with `--dataset` of your own comparisons' lengths:

    qlora-rm plan --params 70B --cards 8
    qlora-rm plan FOLDER_OR_HUB_ID --card 24 --dataset ROWS.jsonl --max_length 1024

Weights are counted on a model without storage, made as the loader makes it; activations are what the model's own forward
and backward pass keep, run on tensors that have shapes and no storage (`qlora_rm/planning/rehearsal.py`); what engines add
is arithmetic, a function a term (`qlora_rm/planning/memory.py`).

Assumed, and not measured here: on a card, 1 GB for CUDA and the libraries' workspaces, 0.5 GB for NCCL between ranks, and
8 % of the activations for the allocator's fragmentation; a card's memory is its nominal size in units of 1e9 bytes. What
DDP and ZeRO share out and hold in buffers is read from their sources. Nothing on this page ran on a card.
"""
MEASURED = """Growth of the resident set, pages of files left out, during two optimizer steps of the train door in NF4 and fp32 over what the process
holds after its imports ({machine}; `python -m benchmarks.memory`, which says how). The prediction has one measured
constant, {libraries:.0f} MB for the trainer, the data and the libraries; the rest is computed. Over {runs} runs it is
between {low:.3f} and {high:.3f} times the measurement."""
WEIGHTS = """A whole copy. Packed is half a byte a weight; scales are NF4's constants, which no engine shards."""
PER_RANK = """LoRA r=16 on all linear layers, accumulating. Under ZeRO-3 with what is gathered at one time; buckets included."""
ACTIVATIONS = f"""At the peak of a micro-batch of one comparison, two sequences of {LENGTH} tokens, half of them shared, in bf16: each
prompt once (FlexAttention), or padded (SDPA, with a mask of its own in every layer)."""
FITS = """The same comparisons, 64 in an optimizer step, LoRA r=16: engine, comparisons x accumulation, GB a card. Settings are
ordered by a cost model in `qlora_rm/planning/planner.py`; a checkpoint costs a second forward pass, ZeRO-3 the
gathering of all packed weights in every pass."""


def main(argv: list[str]) -> int:
    path = RESULTS / "scale.json"
    if argv[:1] == ["plan"] and set(argv[1:]) <= set(SIZES):
        known = json.loads(path.read_text()) if path.exists() else {}
        found = {size: plan(size) if size in (argv[1:] or SIZES) else known[size] for size in SIZES}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    elif argv:
        print(f"error: {argv[0]!r} is not plan [SIZE ...].", file=sys.stderr)
        return 2
    measured = json.loads((RESULTS / "memory_cpu.json").read_text())
    PAGE.write_text(render(json.loads(path.read_text()), measured), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
