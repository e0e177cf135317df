"""Write the files of an exported folder: config, tokenizer and weights, and extra files for single consumers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlora_rm.artifacts.head_names import HEAD, HEAD_BIAS
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.artifacts.own_tokenizer import read_tokenizer
from qlora_rm.config import ExportConfig
from qlora_rm.errors import UserError
from qlora_rm.exporting.consumer import WITH_BIAS_IN_SGLANG, Reader, Writing
from qlora_rm.exporting.files import (
    Placing,
    copy_small_files,
    place_weights,
    read_tensor,
    zero_bias,
)
from qlora_rm.exporting.transformers4_compat import config_for_v4, edit_json, reads_the_same, tokenizer_config_for_v4
from qlora_rm.preferences.clock import reads_clock
from qlora_rm.verification.checks import check_golden_ids, check_tokenizer

V4, VALUE = "v4", "value"
DTYPES_IN_CONFIG = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def write_whole(
    source: Path,
    folder: Path,
    readers: list[Reader],
    manifest: Manifest,
    options: ExportConfig,
    trust_remote_code: bool = False,
) -> list[str]:
    """Write a full model into `folder` for the consumers `readers`. Return notes for the user."""
    wanted: set[Writing] = {writing for reader in readers for writing in reader.writes}
    config = _config(
        json.loads((source / "config.json").read_text(encoding="utf-8")), wanted, manifest, options.normalize
    )
    placing, architecture = Placing(options.copy_weights), config["architectures"][0]
    copy_small_files(source, folder)
    _write_fixed_template(source, folder, trust_remote_code)
    needs_bias = "head bias" in wanted and architecture in WITH_BIAS_IN_SGLANG
    place_weights(source, folder, placing, {HEAD_BIAS: zero_bias(_head(source))} if needs_bias else {})
    notes = _write_for_v4(source, folder, config, manifest, placing, trust_remote_code)
    if "value model" in wanted:
        _write_value_model(source, folder, architecture, placing)
    if "pooler config" in wanted:
        _write_pooler_config(folder, str(config.get("dtype", "float32")))
    for written in (folder, folder / V4, folder / VALUE):
        if written.exists():
            manifest.save(written, _linked(source, written, manifest.files))
    return [str(placing), *notes]


def _linked(source: Path, folder: Path, sha256: dict[str, str]) -> dict[str, str]:
    """Return hashes of the files that both folders share, which need not be read again."""
    both = [name for name in sha256 if (source / name).exists() and (folder / name).exists()]
    return {name: sha256[name] for name in both if (folder / name).samefile(source / name)}


def _write_fixed_template(source: Path, folder: Path, trust_remote_code: bool) -> None:
    """Replace a template that reads the clock, which earlier versions saved, by the one that loading `source` gives."""
    template, path = read_tokenizer(str(source), trust_remote_code).chat_template, folder / "chat_template.jinja"
    if isinstance(template, str) and path.exists() and reads_clock(path.read_text(encoding="utf-8")):
        path.write_text(template, encoding="utf-8")


def write_adapter(
    source: Path, folder: Path, manifest: Manifest, base: str | None, copy: bool, trust_remote_code: bool = False
) -> list[str]:
    """Write an adapter into `folder`, with a name for its base that works from any folder."""
    copy_small_files(source, folder)
    _write_fixed_template(source, folder, trust_remote_code)
    placing = Placing(copy)
    placing.place(source / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    named = {"base_model_name_or_path": manifest.base.name_or_path, "revision": manifest.base.revision}
    if base is not None:
        named = {"base_model_name_or_path": base, "revision": None}
        # the hashes stay: the base may have moved, but its content must be the same
        manifest = replace(manifest, base=replace(manifest.base, name_or_path=base, revision=None))
    edit_json(folder / "adapter_config.json", config | named)
    manifest.save(folder)
    return [str(placing)]


def stored_dtype(folder: Path) -> str:
    """Return the name of the dtype in which a folder's weights are stored."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return DTYPES_IN_CONFIG.get(str(config.get("dtype")), "fp32")


def _config(config: dict[str, Any], wanted: set[Writing], manifest: Manifest, normalize: bool) -> dict[str, Any]:
    """Return the common config: one label that no consumer squashes, and keys that single consumers need."""
    config = config | {"problem_type": "regression", "id2label": {"0": "score"}, "label2id": {"score": 0}}
    if "head name" in wanted:
        config["value_head_prefix"] = HEAD.partition(".")[0]
    if normalize:
        if manifest.reward is None:
            raise UserError(
                "--normalize writes the rewards' mean and deviation, and this manifest has none: train with held-out data."
            )
        config |= {"mean": manifest.reward.mean, "std": manifest.reward.std}
    return config


def _head(source: Path) -> Tensor:
    head = read_tensor(source, HEAD)
    if head is None:
        raise UserError(f"{source} holds no {HEAD}: its head was lost. Merge the adapter again.")
    return head


def _write_for_v4(
    source: Path, folder: Path, config: dict[str, Any], manifest: Manifest, placing: Placing, trust_remote_code: bool
) -> list[str]:
    """Write config and tokenizer for transformers 4 and 5 together, or those for 4 in `v4/` if 5 would read them differently."""
    tokenizer, path = read_tokenizer(str(source), trust_remote_code), folder / "tokenizer_config.json"
    own = json.loads(path.read_text(encoding="utf-8"))
    edit_json(folder / "config.json", config_for_v4(config))
    edit_json(path, tokenizer_config_for_v4(own))
    reasons = []
    if not reads_the_same(source, folder, trust_remote_code):
        reasons.append("the rotary parameters read otherwise")
    if not _same_tokenizer(tokenizer, folder, manifest, trust_remote_code):
        reasons.append("the tokenizer has other tokens")
    if not reasons:
        return []
    (folder / V4).mkdir()
    copy_small_files(folder, folder / V4)
    place_weights(source, folder / V4, placing)
    edit_json(folder / "config.json", config)
    edit_json(path, own)
    return [f"transformers 4 reads the folder {V4}/ in it: as 4 wants them, {' and '.join(reasons)} in 5"]


def _same_tokenizer(before: PreTrainedTokenizerBase, folder: Path, manifest: Manifest, trust_remote_code: bool) -> bool:
    """Return whether transformers 5 still loads the same tokenizer from `folder`.

    For some models it replaces the generic class by another one, which adds tokens of its own.
    """
    try:
        after = read_tokenizer(str(folder), trust_remote_code)
    except UserError:
        return False
    checks = (*check_golden_ids(manifest, after), *check_tokenizer(manifest, after))
    return before.get_vocab() == after.get_vocab() and all(check.ok for check in checks)


def _write_value_model(source: Path, folder: Path, architecture: str, placing: Placing) -> None:
    """Write `value/`: the same weights as a token classifier, whose head has a zero bias and no dropout."""
    value = folder / VALUE
    value.mkdir()
    copy_small_files(folder, value)
    place_weights(source, value, placing, {HEAD_BIAS: zero_bias(_head(source))})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = architecture.replace("ForSequenceClassification", "ForTokenClassification")
    edit_json(value / "config.json", config | {"architectures": [architecture], "classifier_dropout": 0.0})


def _write_pooler_config(folder: Path, dtype: str) -> None:
    """Write `vllm.yaml`: the last token's raw score, computed in the dtype of the weights."""
    pooler = json.dumps({"pooling_type": "LAST", "use_activation": False})
    text = f"runner: pooling\ndtype: {dtype}\npooler-config: '{pooler}'\n"
    (folder / "vllm.yaml").write_text(text, encoding="utf-8")
