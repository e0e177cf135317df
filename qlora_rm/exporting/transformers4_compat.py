"""Config and tokenizer files that transformers 4 reads as transformers 5 does.

transformers 5 writes `rope_parameters` alone, which 4.57 ignores without a word: it rotates with a theta of 10,000
whatever the model was trained with. It also names tokenizer classes that 4 does not have. What 4 looks for is written
beside what 5 reads, never instead of it.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig

GENERIC = "PreTrainedTokenizerFast"
"""In transformers 4 the class that does what tokenizer.json says; 5 knows it under another name and the old one."""

OF_THE_WRITER = ("is_local", "local_files_only")
"""Keys about the machine that saved the tokenizer."""

NESTED = {"full_attention", "sliding_attention"}
NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def config_for_v4(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the keys that transformers 4 reads: `torch_dtype`, `rope_theta`, `rope_scaling` and kin.

    Rotary parameters nested otherwise than by full and sliding attention are left alone: 4 has no name for them.
    """
    known = dict(config)
    if "dtype" in config:
        known["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if not rope:
        return known
    if set(rope) == NESTED:
        known["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    elif any(isinstance(value, dict) for value in rope.values()):
        return known
    apart = {name: rope[name] for name in NEOX_NAMES if name in rope}
    known |= apart
    if config.get("model_type") == "gpt_neox":
        known |= {NEOX_NAMES[name]: value for name, value in apart.items()}
    if rope.get("rope_type", "default") != "default":
        known["rope_scaling"] = {name: value for name, value in rope.items() if name not in apart}
    return known


def tokenizer_config_for_v4(config: dict[str, Any]) -> dict[str, Any]:
    """`config` (of tokenizer_config.json) under the class and names of special tokens that transformers 4 knows."""
    known = {name: value for name, value in config.items() if name not in OF_THE_WRITER}
    known["tokenizer_class"] = GENERIC
    extra = known.get("extra_special_tokens")
    if isinstance(extra, list):  # 4 wants named ones here, and the others under their older name
        del known["extra_special_tokens"]
        known["additional_special_tokens"] = extra
    return known


def reads_the_same(before: Path, after: Path, trust_remote_code: bool = False) -> bool:
    """Whether transformers 5 makes one config of both folders, as far as rotary positions go."""
    first, second = (
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config().to_dict()
        for folder in (before, after)
    )
    return first.get("rope_parameters") == second.get("rope_parameters")


def generic_ids(folder: Path, texts: list[str], add_special_tokens: bool) -> list[list[int]] | None:
    """Token ids by tokenizer.json alone, which is what transformers 4's generic class does; None without that file."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)]


def edit_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file: a linked one is left as it is under its other name."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
