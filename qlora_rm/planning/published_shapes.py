"""Shapes of published backbones, by the size they are known by; each is a transformers configuration."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from qlora_rm.backbone.load import read_model_config
from qlora_rm.errors import UserError

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "7B": ("Mistral 7B", {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "sliding_window": None}),
    "8B": ("Llama 3.1 8B", {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}),
    "13B": ("Llama 2 13B", {"model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000}),
    "32B": ("Qwen 2.5 32B", {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "use_sliding_window": False}),
    "70B": ("Llama 3 70B", {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}),
    "405B": ("Llama 3.1 405B", {"model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256}),
    "8x7B": ("Mixtral 8x7B", {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000, "sliding_window": None}),
    "30B-A3B": ("Qwen 3 30B-A3B", {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936, "use_sliding_window": False}),
    "235B-A22B": ("Qwen 3 235B-A22B", {"model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "use_sliding_window": False}),
}  # fmt: skip
CONTEXT = 131_072
"""Positions; rotary ones do not affect memory."""


def published(size: str) -> PretrainedConfig:
    """Return the configuration known by `size`, in upper or lower case.

    Raises:
        UserError: there is none.
    """
    known = {name.lower(): fields for name, (_, fields) in PUBLISHED.items()}
    if size.lower() not in known:
        raise UserError(
            f"--params {size}: there are {', '.join(PUBLISHED)}; of others give the MODEL's folder or hub id."
        )
    return AutoConfig.for_model(**known[size.lower()], max_position_embeddings=CONTEXT)


def read_shape(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the configuration of a folder, a hub id, or a config.json alone; weights are not needed."""
    path = Path(name).expanduser()
    folder = str(path.parent) if path.is_file() and path.name == "config.json" else name
    return read_model_config(folder, revision, trust_remote_code)
