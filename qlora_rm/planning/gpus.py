"""Devices a run is planned for: GPUs of four sizes, any other GPU, or the memory of a host without one."""

from dataclasses import dataclass

from qlora_rm.errors import UserError

GB = 1e9


@dataclass(frozen=True)
class Card:
    """A device as the plan models it.

    Attributes:
        memory: bytes. For a GPU its nominal size in units of 1e9, which is a little less than it reports.
        is_cuda: False for a process on a host's processors.
        tflops: dense bf16 products, 1e12 operations a second. Like the two rates below it orders settings and does not
            predict seconds.
        bandwidth: of its memory, 1e9 bytes a second.
        link: to its neighbours, 1e9 bytes a second.
        context: bytes that CUDA and the libraries' workspaces take. An assumption, not measured here.
        fragmentation: what the allocator holds beyond the requested memory, as a share of the activations. Also
            assumed.
    """

    name: str
    memory: float
    is_cuda: bool = True
    tflops: float = 150
    bandwidth: float = 1000
    link: float = 20
    context: float = 1.0 * GB
    communication: float = 0.5 * GB
    fragmentation: float = 0.08

    def runtime(self, ranks: int) -> int:
        """Bytes that belong to no tensor of the run; with several ranks they include NCCL's buffers."""
        return round(self.context + (self.communication if ranks > 1 else 0))


CARDS = {
    "24": Card("24 GB", 24 * GB, tflops=140, bandwidth=1000, link=20),
    "48": Card("48 GB", 48 * GB, tflops=180, bandwidth=850, link=20),
    "80": Card("80 GB", 80 * GB, tflops=312, bandwidth=2000, link=250),
    "141": Card("141 GB", 141 * GB, tflops=900, bandwidth=4800, link=400),
}
"""GPUs by memory; the rates are about those of an RTX 4090, an RTX A6000, an A100 and an H200."""

LIBRARIES = 0.02 * GB
"""Growth of a CPU process between the end of its imports and the first step, beyond the weights.

The trainer, the data and the libraries' thread pools cause it. Measured (benchmarks/memory.py).
"""


def processors(memory: float) -> Card:
    """A process on a host's processors with `memory` bytes to itself."""
    return Card(
        "CPU", memory, is_cuda=False, tflops=0.5, bandwidth=50, link=5, context=LIBRARIES, communication=0.0,
        fragmentation=0.0,
    )  # fmt: skip


def card_named(word: str) -> Card:
    """Parse 24, 48, 80, 141, any other number of GB, or cpu with such a number (cpu:64).

    Raises:
        UserError: it is none of these.
    """
    name, _, size = word.lower().removesuffix("gb").strip().partition(":")
    if name in CARDS:
        return CARDS[name]
    try:
        memory = float(size if name == "cpu" else name) * GB
    except ValueError:
        memory = 0.0
    if memory <= 0:
        raise UserError(f"--card {word}: give its memory in GB (24, 48, 80, 141, ...), or cpu:64 for a host of 64 GB.")
    return processors(memory) if name == "cpu" else Card(f"{name} GB", memory)
