"""Generate docs/manifest.md, which describes the manifest's schema for people, from the schema's dataclasses.

python -m qlora_rm.artifacts.manifest_page > docs/manifest.md
"""

import dataclasses
import inspect
import re
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qlora_rm.artifacts.golden import ROUNDED, SAME, GoldenItem
from qlora_rm.artifacts.manifest import (
    FILE_NAME,
    Base,
    Contract,
    Manifest,
    Merge,
    Reward,
    Step,
    Training,
)
from qlora_rm.artifacts.manifest_versions import SCHEMA_VERSION
from qlora_rm.artifacts.noise import FP32_WIDEST, LARGEST, TYPICAL, Noise

OBJECTS = (Manifest, Contract, Base, Training, Reward, GoldenItem, Noise, Merge, Step)

HEAD = f"""# {FILE_NAME}, version {SCHEMA_VERSION}

Every model folder of this project holds one: what a reader must know to give a model's sequences the scores that it was
trained to give. It is written at the end of training; every later step (merge, re-quantization, export) carries it
along and adds a record of itself. Every key is there and no other; what is unknown is null. A file of version 1 is
read as one without hashes and history, a file of version 2 as one without noise and without the last three keys of the contract, a
file of version 3 as one without hashes of configurations. Words and numbers that the tables do not allow are refused when
the file is read. This page is made from the schema by `python -m qlora_rm.artifacts.manifest_page`.
"""

PROOF = """## What hashes, golden scores and signatures prove

`files` lists every file of the folder that a consumer loads. `score`, `eval`, `serve`, `merge`, `export` and `train --adapter` compare
the folder with it before they load anything, and `verify` does so in full. `--skip_checks` goes without.

Hashes and golden scores are not signatures. They find accidents, and careless changes. **Whoever can write the folder can edit
files, hashes and golden scores consistently, and then every check holds.** To know who wrote a folder, use one of these:

- Keep the manifest's sha256 in a place that others cannot write to, and compare it.
- Sign the manifest: `qlora-rm sign DIR --key KEY.pem` writes `rm_manifest.json.sig`, an Ed25519 signature in base64 of the
  manifest's bytes, which hold the hashes of all other files. `qlora-rm verify DIR --key PUBLIC.pem` checks it before it reads anything
  else. Both need `pip install 'qlora_rm[sign]'`. `openssl genpkey -algorithm ed25519 -out KEY.pem` makes a key, and `openssl pkey
  -in KEY.pem -pubout -out PUBLIC.pem` its public half.

A merged or exported folder has its own manifest and needs its own signature. Of an adapter's base, the signature covers the hash of
config.json and the sampled fingerprint of the weights.
"""

RULE = f"""## How far scores may move

Whatever scores the golden items again (`merge`, `verify`, `export`, `serve`) compares the scores with the golden ones. Rounding
alone moves them, in one model further than in another, so the bound is not a constant. At the end of training the
golden items are scored in fp32 and in bf16 (in fp16 too on a GPU), in each dtype alone, in padded batches and as a forest.
`noise` holds how far these scores lie from the golden ones.

- **16 bit on either side** (training, storage of merged weights, or arithmetic): a score may move by {LARGEST:g} times the
  largest noise of the dtypes involved and of fp32. The root mean square of all differences may reach {TYPICAL:g} times the typical
  noise. The bound never exceeds half the standard deviation of the golden scores, or {ROUNDED.absolute:g} if that is more, so
  that a lost adapter or another head still fails on a model with noisy scores.
- **fp32 throughout**: {LARGEST:g} times the largest noise in fp32, at least {SAME.absolute:g} or {SAME.relative:.2%} of the score, at
  most {FP32_WIDEST:g}.
- **A batch against the same sequences alone**, in one dtype: {LARGEST:g} times the noise between layouts, within the same limits.
- **Pairs** further apart than twice the bound must keep their order.
- **Noise that was not measured** (older manifests, ZeRO-3 with its sharded weights, LLM.int8()): {ROUNDED.absolute:g} or
  {ROUNDED.relative:.0%} of the score, order kept above a margin of {ROUNDED.flip_margin:g}. Noise in fp16 that was not measured is
  that in bf16, which has fewer digits.

Training prints the noise. If a merge to bf16 is refused, the model's scores do not survive bf16: merge with `--dtype fp32`.
"""


def page() -> str:
    """The complete page."""
    return "\n".join([HEAD, *(line for cls in OBJECTS for line in _section(cls)), PROOF, RULE])


def _section(cls: Any) -> list[str]:
    """A heading, the class's summary, and a table of its keys."""
    summary, about = _described(cls)
    hints = get_type_hints(cls)
    rows = [f"| `{f.name}` | {_type_name(hints[f.name])} | {about.get(f.name, '')} |" for f in dataclasses.fields(cls)]
    return [f"## {cls.__name__}", "", summary, "", "| key | type | what |", "|---|---|---|", *rows, ""]


def _described(cls: Any) -> tuple[str, dict[str, str]]:
    """The docstring's prose, and field name -> its text under Attributes."""
    prose, _, attributes = inspect.cleandoc(cls.__doc__).partition("\n\nAttributes:\n")
    about: dict[str, str] = {}
    for entry in re.split(r"\n    (?=\S)", "\n" + attributes)[1:]:
        names, _, text = entry.partition(": ")
        for name in names.split(", "):
            about[name] = " ".join(text.split())
    return " ".join(prose.split()), about


def _type_name(hint: Any) -> str:
    """Name of a type in terms of JSON: `str or null`, `list of GoldenItem`, `"none" or "4bit"`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f'"{word}"' for word in inner)
    if origin in (types.UnionType, Union):
        return " or ".join(map(_type_name, inner))
    if origin is list:
        return f"list of {_type_name(inner[0])}"
    if origin is dict:
        return f"object of {_type_name(inner[1])}"
    return {Any: "any", type(None): "null"}.get(hint) or hint.__name__


if __name__ == "__main__":
    print(page(), end="")
