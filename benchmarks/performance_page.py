"""Write docs/performance.md and its plot from the committed results. `qlora-rm bench` calls this at its end."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, PLOT = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.png"

HEAD = """# What computing shared prompts once gains

Written by `qlora-rm bench` from `benchmarks/results/`; how each side is set up stands at the head of
`benchmarks/prefix_sharing.py`. Both sides run in one process, one after the other, on the same comparisons, with the
same 4-bit backbone, adapters and fp32 arithmetic. "shared" is this trainer without gradient checkpointing.
"""
TITLES = {
    "hh": "HH-RLHF harmless, pairs",
    "finegrained": "Fine-grained RLHF, K = 4, long passages in the prompt",
    "oasst": "OASST, ranked siblings in conversation trees",
    "zh": "Chinese pairs (LLaMA-Factory's demo set)",
    "short": "Where it cannot help: prompts of 4 tokens before responses of 250",
}


def write_page() -> None:
    """Write the page from all results. Benchmarks without results are omitted."""
    found = {
        path.stem.removeprefix("prefix_sharing_"): json.loads(path.read_text())
        for path in RESULTS.glob("prefix_sharing_*.json")
    }
    parts = [HEAD]
    for name, title in TITLES.items():
        if name in found:
            parts.append(f"## {title}\n\n{_machine(found[name]['machine'])}\n\n{_sides(found[name]['result'])}")
    if "sweep" in found:
        points = found["sweep"]["result"]
        _plot(points)
        parts.append(
            f"## How it grows\n\n{_machine(found['sweep']['machine'])} Against this trainer's own padded batches.\n\n{_sweep(points)}\n\n![Speed-up over prompt share, K and length](performance.png)"
        )
    if (served := RESULTS / "serving.json").exists():
        found_served = json.loads(served.read_text())
        parts.append(f"## Serving\n\n{_machine(found_served['machine'])}\n\n{_serving(found_served['result'])}")
    PAGE.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


def _machine(machine: dict[str, Any]) -> str:
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"{machine['cpu']}, {threads}, torch {machine['versions']['torch']}, trl {machine['versions']['trl']}."


def _sides(result: dict[str, Any]) -> str:
    rows = ["| side | comparisons/s | shared is faster by | peak memory growth |", "|---|---|---|---|"]
    for side, measured in result["sides"].items():
        ratio = result["speedup_over"].get(side)
        memory = f"{measured['peak_mb']:,.0f} MB" if measured["peak_mb"] is not None else ""
        rows.append(
            f"| {side} | {result['comparisons'] / measured['seconds']:.3f} | {f'{ratio:.2f}x' if ratio else ''} | {memory} |"
        )
    said = f"{result['comparisons']} comparisons, {result['tokens']:,} tokens, {result['distinct_tokens']:,} of them distinct."
    if "score_difference" in result:
        said += f" Packed and padded scores differ by {result['score_difference']:.1e} at most."
    return "\n\n".join([said, *([result["note"]] if "note" in result else []), "\n".join(rows)])


def _sweep(points: list[dict[str, Any]]) -> str:
    rows = ["| prompt share | K | length | plain, comparisons/s | shared | speed-up |", "|---|---|---|---|---|---|"]
    for p in points:
        per_second = {side: p["comparisons"] / p["sides"][side]["seconds"] for side in ("plain", "shared")}
        rows.append(
            f"| {p['share']:.0%} | {p['k']} | {p['length']} | {per_second['plain']:.2f} | {per_second['shared']:.2f} | {p['speedup_over']['plain']:.2f}x |"
        )
    return "\n".join(rows)


def _serving(result: dict[str, Any]) -> str:
    rows = [
        "| side | responses per CPU second | responses/s | requests a batch | tokens computed of asked | latency p50, p99 |",
        "|---|---|---|---|---|---|",
    ]
    for side, m in result["sides"].items():
        work, speed = (result["responses"] / m[unit] for unit in ("cpu_seconds", "seconds"))
        online = (
            f"{m['requests_per_batch']:.1f} | {m['computed_of_asked']:.0%} | {m['latency_p50']:.3f} s, {m['latency_p99']:.3f} s"
            if "requests" in m
            else " | | "
        )
        rows.append(f"| {side} | {work:.1f} | {speed:.1f} | {online} |")
    largest = max(m.get("largest_difference", 0.0) for m in result["sides"].values())
    said = (
        f"{result['responses']} responses to {result['prompts']} prompts, {result['tokens']:,} tokens, through `qlora-rm serve`; how "
        f"each side is set up stands at the head of `benchmarks/serving.py`. {result['clients']} clients at once, no answer lost or "
        f"another's: each is within {largest:.1e} of the offline score of its own text. The machine was shared with "
        "other work while this ran, which falls on the sides unevenly: read the CPU seconds, of the server with its HTTP, or "
        "offline of the scoring process."
    )
    ratios = [
        f"| {name} | {ratio['cpu_seconds']:.2f}x | {ratio['seconds']:.2f}x |"
        for name, ratio in result["speedup"].items()
    ]
    head = "| faster by | in CPU seconds | by the clock |\n|---|---|---|"
    return "\n\n".join([said, "\n".join(rows), "\n".join([head, *ratios])])


def _plot(points: list[dict[str, Any]]) -> None:
    panels = {
        "prompt share (K 2, 512 tokens)": ("share", lambda p: p["k"] == 2 and p["length"] == 512),
        "K (share 75 %, 512 tokens)": ("k", lambda p: p["share"] == 0.75 and p["length"] == 512),
        "length (share 75 %, K 2)": ("length", lambda p: p["share"] == 0.75 and p["k"] == 2),
    }
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (title, (key, chosen)) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        line = sorted((p[key], p["speedup_over"]["plain"]) for p in points if chosen(p))
        axes.plot(*zip(*line, strict=True), "o-")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xlabel=title)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylim(bottom=0)
    figure.supylabel("times faster than padded batches")
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    write_page()
