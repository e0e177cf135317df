"""Make random backbones of the architectures that are compared, and a tokenizer for them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as t

from benchmarks.gpu.suite import Setting
from qlora_rm.demo.backbone import train_tokenizer
from qlora_rm.preferences.comparison import Message


@dataclass(frozen=True)
class Size:
    """Shape of the backbones and of the sequences on which they are compared.

    Attributes:
        window: window of sliding attention, shorter than a prompt.
        prompt: number of tokens that the responses to one prompt share.
    """

    hidden: int
    layers: int
    window: int
    prompt: int


SMALL, LARGE = Size(64, 2, 8, 40), Size(256, 4, 64, 200)
VOCABULARY = 512
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def size_of(setting: Setting) -> Size:
    return SMALL if setting.small else LARGE


def configs(size: Size) -> dict[str, t.PretrainedConfig]:
    """Return a configuration per architecture. gemma3 and gpt_oss mix layers with and without a window."""
    heads = 4
    shape: dict[str, Any] = {
        "hidden_size": size.hidden, "intermediate_size": 2 * size.hidden, "num_hidden_layers": size.layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "max_position_embeddings": 1024,
        "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    own, window = {"head_dim": size.hidden // heads}, {"sliding_window": size.window}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * (size.layers // 2)}
    return {
        "llama": t.LlamaConfig(**shape),
        "qwen3": t.Qwen3Config(**shape, **own),
        "mistral": t.MistralConfig(**shape, **own, **window),
        "gemma3": t.Gemma3TextConfig(**shape, **own, **window, **kinds),
        "gpt_oss": t.GptOssConfig(**shape, **own, **window, **kinds, **EXPERTS),
        "mixtral": t.MixtralConfig(**shape, **EXPERTS),
    }


def checkpoint(setting: Setting, architecture: str) -> str:
    """Return the folder of such a language model in bf16, made once. Its random weights make masks and experts matter."""
    folder = setting.scratch / architecture
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        size = size_of(setting)
        model = t.AutoModelForCausalLM.from_config(configs(size)[architecture])
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # with default initial weights, all attention heads see nearly the same
                parameter.data.normal_(std=size.hidden**-0.5)
        model.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def tokenizer(setting: Setting) -> t.PreTrainedTokenizerBase:
    """Return a byte-level tokenizer, made once, with no more tokens than the backbones have embeddings."""
    folder = setting.scratch / "tokenizer"
    if not folder.exists():
        made = train_tokenizer(conversations(), VOCABULARY)
        made.add_special_tokens({"pad_token": "<|reserved_0|>"})
        made.save_pretrained(folder)
    return t.AutoTokenizer.from_pretrained(folder)


def conversations() -> list[list[Message]]:
    return [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        for row in preference_rows(64)
        for side in ("chosen", "rejected")
    ]


ANIMALS = ("cat", "dog", "bird", "fish", "horse", "cow", "sheep", "goat")


def preference_rows(count: int) -> list[dict[str, str]]:
    """Make pairs whose better answer names the requested animal."""
    rows = []
    for i in range(count):
        right, wrong = ANIMALS[i % len(ANIMALS)], ANIMALS[(i * 3 + 1) % len(ANIMALS)]
        rows.append({"prompt": f"{i}: name the {right}. ", "chosen": f"a {right}", "rejected": f"a {wrong}, I think"})
    return rows


def write(folder: Path, lines: str) -> str:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text(lines, encoding="utf-8")
    return str(folder)
