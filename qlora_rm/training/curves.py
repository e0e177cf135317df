"""Plot of loss, accuracy and margin over the steps of a run."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PANELS = ("loss", "accuracy", "margin")


def draw_curves(log_history: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG with panels for loss, accuracy and margin: training as a line, held-out data as points on a line.

    Arguments:
        log_history: the trainer's log, one mapping per entry, with `step` and any of the panels' names.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for key, label, style in ((name, "training", "-"), (f"eval_{name}", "held out", "o-")):
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=120)
