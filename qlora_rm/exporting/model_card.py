"""Write the model card of an exported folder: training data, accuracy, the meaning of scores, and how to load it."""

import json
from pathlib import Path
from string import Template
from typing import Any

from qlora_rm.artifacts.manifest import Contract, Manifest
from qlora_rm.artifacts.trained_text import scores_turns
from qlora_rm.backbone.paths import is_local
from qlora_rm.exporting.consumer import Reader
from qlora_rm.exporting.files import head_names
from qlora_rm.exporting.write import V4

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

TURNS = """\
turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
text = tokenizer.apply_chat_template(turns, tokenize=False)"""
PLAIN_TEXT = """\
text = "Why? Because." + (tokenizer.eos_token or "")"""


def write_card(
    folder: Path,
    name: str,
    readers: list[Reader],
    manifest: Manifest,
    unchecked: list[str],
    evaluation: dict[str, Any] | None,
) -> None:
    """Write README.md into `folder`.

    Arguments:
        name: the folder's final name, which the snippets load.
        evaluation: what `qlora-rm eval` wrote; None where none was given.
    """
    adapter = any(reader.takes == "adapter" for reader in readers)
    filled = {
        "folder": name,
        "load": f"{name}/{V4}" if (folder / V4).exists() else name,
        "dtype": TORCH_NAMES[manifest.compute_dtype],
        "text": TURNS if scores_turns(manifest) else PLAIN_TEXT,
        "special_tokens": str(not scores_turns(manifest)),
        "quantization": _quantization(folder, manifest) if adapter else "",
    }
    sections = [
        _front_matter(manifest, adapter),
        f"# {Path(name).name}",
        "A scalar reward model: one number per conversation or text, higher for what people prefer. Numbers are comparable\n"
        "between responses to one prompt; across prompts they are not calibrated."
        + (" This folder is an adapter with its head; the base is loaded beside it." if adapter else ""),
        "## How good it is",
        _figures(manifest, evaluation),
        "## What it was trained on",
        _training(manifest),
        "## How a score is made",
        _contract(manifest.contract),
        "## How to load it",
        *(_snippet(reader, filled) for reader in readers),
        "## Limits",
        _limits(readers, unchecked),
        "Licence: that of the base and of the data bind this model; state yours in the front matter.",
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _front_matter(manifest: Manifest, adapter: bool) -> str:
    """Return the front matter that the hub reads. A base in a local folder has no hub id and is omitted."""
    lines = [
        "---",
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-classification",
        "tags:",
        *(f"- {tag}" for tag in ("reward-model", "rlhf", "qlora_rm", *(["lora"] if adapter else []))),
    ]
    if not is_local(manifest.base.name_or_path):
        lines.append(f"base_model: {manifest.base.name_or_path}")
        lines.append(f"base_model_relation: {'adapter' if adapter else 'finetune'}")
    return "\n".join([*lines, "---"])


def _figures(manifest: Manifest, evaluation: dict[str, Any] | None) -> str:
    lines = []
    if evaluation is None:
        lines.append(
            "- Accuracy on held-out preferences: not given (`qlora-rm eval` measures it, `export --evaluation FILE` "
            "writes it here)."
        )
    else:
        overall = evaluation["overall"]
        low, high = overall["interval"]
        lines.append(
            f"- Accuracy on held-out preferences: {overall['accuracy']:.1%} of {overall['wins']:,} pairs "
            f"(95 % interval {low:.1%} to {high:.1%}); choosing the longer response reaches "
            f"{_percent(evaluation.get('prefer_longer'))}, the shorter {_percent(evaluation.get('prefer_shorter'))}."
        )
    reward = manifest.reward
    if reward is not None:
        lines.append(
            f"- Rewards: mean {reward.mean:.4f}, standard deviation {reward.std:.4f} over {reward.n:,} held-out responses."
        )
    merge = manifest.merge
    if merge is not None:
        lines.append(
            f"- Merge: {merge.method}; stored in {merge.dtype}; scores within {merge.drift:.2g} of those after training."
        )
    lines += [
        f"- Quantized again to {step.settings['quantization']}: scores moved by up to {step.drift:.2g}, {step.flips} of "
        f"{step.pairs} golden pairs changed their order."
        for step in manifest.history
        if step.name == "requantize"
    ]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{share:.1%}"


def _training(manifest: Manifest) -> str:
    base, training = manifest.base, manifest.training
    at = f" at revision {base.revision}" if base.revision else ""
    place = "a local folder" if is_local(base.name_or_path) else f"`{base.name_or_path}`{at}"
    lines = [
        f"- Base: {place}, config.json sha256 `{base.config_sha256 or 'unknown'}`, "
        f"quantization {manifest.quantization}, computed in {manifest.compute_dtype}."
    ]
    if training is not None:
        settings = ", ".join(f"{key} {value}" for key, value in training.objective.items())
        lines.append(f"- {training.steps:,} optimizer steps; {settings}.")
        parts = training.data_report.get("parts", {})
        for part, held in parts.items():
            sources = ", ".join(f"{source or 'unnamed'} {count:,}" for source, count in held["sources"].items())
            lines.append(
                f"- Data, {part}: {held['comparisons']:,} comparisons of {held['prompts']:,} prompts, {held['wins']:,} wins, "
                f"{held['ties']:,} ties; by source: {sources}."
            )
        lines.append(f"- Fingerprint of the data: `{training.data_fingerprint or 'unknown'}`.")
    versions = ", ".join(f"{library} {version}" for library, version in manifest.versions.items())
    return "\n".join([*lines, f"- Made with {versions}."])


def _contract(contract: Contract) -> str:
    rule = (
        "no limit of length"
        if contract.max_length is None
        else f"at most {contract.max_length:,} tokens ({contract.over_long})"
    )
    return "\n".join(
        [
            f"- The score is read at the {contract.score_position}; pad is id {contract.pad_token_id}, eos "
            f"{contract.eos_token_id}, bos {contract.bos_token_id}.",
            f"- End of text: {contract.eos_rule}.",
            f"- Chat template sha256: `{contract.chat_template_sha256 or 'none: plain text'}`.",
            *(
                [f"- The chat template reads the clock; here it renders {contract.date}, as in training."]
                if contract.date
                else []
            ),
            f"- Trained on {_kinds(contract)}{rule}.",
            "- `rm_manifest.json` holds texts with their ids and scores; `qlora-rm verify` compares them.",
        ]
    )


def _kinds(contract: Contract) -> str:
    return f"{' and '.join(contract.trained_on).replace('_', ' ')}, " if contract.trained_on else ""


def _snippet(reader: Reader, filled: dict[str, str]) -> str:
    language = "python" if "import " in reader.snippet else "sh"
    code = Template(reader.snippet).substitute(filled)
    return f"### {reader.name}: {reader.versions}\n\nFed: {reader.fed}.\n\n```{language}\n{code}\n```"


def _limits(readers: list[Reader], unchecked: list[str]) -> str:
    lines = [f"- {reader.name}: {reader.limits}." for reader in readers]
    return "\n".join([*lines, *(f"- Not checked when this folder was made: {what}." for what in unchecked)])


def _quantization(folder: Path, manifest: Manifest) -> str:
    """Return the expression that quantizes the base as in training, except for its head."""
    skip = f"llm_int8_skip_modules={json.dumps(head_names(folder))}"
    if manifest.quantization == "8bit":
        return f"BitsAndBytesConfig(load_in_8bit=True, {skip})"
    if manifest.quantization == "none":
        return "None"
    return (
        'BitsAndBytesConfig(\n        load_in_4bit=True,\n        bnb_4bit_quant_type="nf4",\n'
        "        bnb_4bit_use_double_quant=True,\n"
        f"        bnb_4bit_compute_dtype=torch.{TORCH_NAMES[manifest.compute_dtype]},\n        {skip},\n    )"
    )
