"""Define a consumer of reward models, and the architectures that consumers are known to score correctly."""

from dataclasses import dataclass
from typing import Literal

from qlora_rm.exporting.consumer_inputs import Feed

Writing = Literal["value model", "head bias", "head name", "pooler config"]
Proof = Literal["run", "re-enacted", "read"]


@dataclass(frozen=True)
class Reader:
    """One consumer of reward models.

    Attributes:
        name: its name for `--for`.
        versions: the versions that were read or run.
        loads, reads_at, fed: the class it loads, the token it reads, and the text or ids it feeds; for people.
        takes: a full model, or an adapter on its base.
        architectures: the allow-list; None where any sequence classifier works.
        writes: what it needs beyond the common folder.
        feed: how it turns golden items into ids; None where the user does that, as the snippet shows.
        needs_template: it scores conversations only.
        rounds: it computes in 16 bit: bf16, or fp16 where the weights are fp32.
        reads_v4: it runs on transformers 4.
        reads_4bit: it loads a model with transformers unchanged, or uses a server that does.
        clips: it clips scores to plus and minus this value; None where it does not.
        shares_vocabulary: it passes the policy's token ids to the reward model.
        proof: "run": the tests run it. "re-enacted": the tests do what its source does. "read": its source was read.
        unchecked: what cannot be checked on the exporting machine.
        limits: for the table of consumers.
        snippet: how to load the folder there; $folder, $load and $quantization are filled in.
    """

    name: str
    versions: str
    loads: str
    reads_at: str
    fed: str
    proof: Proof
    limits: str
    snippet: str
    takes: Literal["model", "adapter"] = "model"
    architectures: frozenset[str] | None = None
    writes: tuple[Writing, ...] = ()
    feed: Feed | None = None
    needs_template: bool = False
    rounds: bool = False
    reads_v4: bool = False
    reads_4bit: bool = False
    clips: float | None = None
    shares_vocabulary: bool = False
    unchecked: tuple[str, ...] = ()


def classifiers(*names: str) -> frozenset[str]:
    return frozenset(f"{name}ForSequenceClassification" for name in names)


WITH_BIAS_IN_SGLANG = classifiers("Qwen2", "Qwen3")
WITH_SCORE = classifiers("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Phi3")
"""Decoders with one bias-free `score` on `model`. The tests load each in the consumers that use this set."""

IN_V4 = WITH_SCORE | classifiers("GPT2")
