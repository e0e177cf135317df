"""Patterns of the lines that our training runs print; any other line comes from another library."""

import re

PHASES = "starting|reading|tokenizing|loading|loading and quantizing|training|evaluating|golden scores|scoring|hashing|hashing the base|saving"
TIME = r"(\d+ h \d+ min|\d+ min \d+ s|\d+ s)"
KNOWN = [
    re.compile(pattern)
    for pattern in (
        r"data: .*",
        r"(training|held-out): .* comparisons of .* prompts, .*",
        rf"({PHASES}): ([\d,]+ of [\d,]+ \w+, \d+ %.*|([\d,]+ \w+, )?{TIME} so far|([\d,]+ \w+ in )?{TIME})",
        r"compute dtype: .*",
        r"quantized: .*",
        r"attention kernel: .*",
        r"sharded: .* on this process",
        r"shared prompts: .*",
        r"score head: .*",
        r"(part  |-----|adapter  |backbone  |head  |total  ).*",
        r"noise .*",
        r"training on [\d,]+ comparisons",
        r"engine: .*",
        r"step [\d,]+ of [\d,]+: held-out accuracy \d\.\d{4}, loss .*",
        r"(held-out accuracy|held-out loss|held-out comparisons|steps|time|reward model)  +\S.*",
        r"next:",
        r"  qlora-rm (eval|merge|verify|score) .*",
        r"",
    )
]


def unknown(said: str) -> list[str]:
    """Return the lines of a run's standard error that are not ours."""
    return [line for line in said.splitlines() if not any(pattern.fullmatch(line) for pattern in KNOWN)]
