"""The noun of this room: a reader of reward models, and the architectures that readers are known to score rightly."""

from dataclasses import dataclass
from typing import Literal

from qlora_rm.exporting.consumer_inputs import Feed

Writing = Literal["value model", "head bias", "head name", "pooler config"]
Proof = Literal["run", "re-enacted", "read"]


@dataclass(frozen=True)
class Reader:
    """One reader of reward models.

    Attributes:
        name: what stands after `--for`.
        versions: the versions it was read or run in.
        loads, reads_at, fed: by which class, at which token, and with which text or ids; for people.
        takes: a whole model, or an adapter on its base.
        architectures: the allow-list; None where any sequence classifier will do.
        writes: what it needs beyond the common folder.
        feed: how it turns golden items into ids; None where that is the user's to do, as the snippet shows.
        needs_template: it scores conversations only.
        rounds: it computes in 16 bit: bf16, or fp16 where the weights are fp32.
        reads_v4: it runs on transformers 4.
        reads_4bit: it loads a model with transformers as it is, or asks a server that does.
        clips: it cuts scores off at plus and minus this; None where it does not.
        shares_vocabulary: it hands the policy's token ids to the reward model.
        proof: "run": the tests run it. "re-enacted": the tests do what its source does. "read": its source was read.
        unchecked: what cannot be checked on the machine that exports.
        limits: for the table of readers.
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
"""Decoders with one bias-free `score` on `model`; the tests read each in the readers that name this set."""

IN_V4 = WITH_SCORE | classifiers("GPT2")
