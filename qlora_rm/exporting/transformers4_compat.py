"""Write config and tokenizer files that transformers 4 reads as transformers 5 does.

transformers 5 writes only `rope_parameters`, which 4.57 silently ignores: it rotates with a theta of 10,000, whatever the model
was trained with. transformers 5 also names tokenizer classes that 4 lacks. The keys for 4 are added to those for 5 and never
replace them.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig

GENERIC = "PreTrainedTokenizerFast"
"""The transformers 4 class that follows tokenizer.json. transformers 5 accepts this name and a new one."""

OF_THE_WRITER = ("is_local", "local_files_only")
"""Keys about the machine that saved the tokenizer."""

NESTED = {"full_attention", "sliding_attention"}
NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def config_for_v4(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with the keys that transformers 4 reads: `torch_dtype`, `rope_theta`, `rope_scaling` and so on.

    Rotary parameters nested by anything other than full and sliding attention stay unchanged: 4 has no names for them.
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
    """Return `config` (of tokenizer_config.json) with the class and the names of special tokens of transformers 4."""
    known = {name: value for name, value in config.items() if name not in OF_THE_WRITER}
    known["tokenizer_class"] = GENERIC
    extra = known.get("extra_special_tokens")
    if isinstance(extra, list):  # 4 expects named tokens here, and a list under the older name
        del known["extra_special_tokens"]
        known["additional_special_tokens"] = extra
    return known


def reads_the_same(before: Path, after: Path, trust_remote_code: bool = False) -> bool:
    """Return whether transformers 5 reads the same rotary parameters from both folders."""
    first, second = (
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config().to_dict()
        for folder in (before, after)
    )
    return first.get("rope_parameters") == second.get("rope_parameters")


def generic_ids(folder: Path, texts: list[str], add_special_tokens: bool) -> list[list[int]] | None:
    """Return token ids by tokenizer.json alone, as transformers 4's generic class does. None without that file."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)]


def edit_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file. Other hard links to the old file keep its content."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
