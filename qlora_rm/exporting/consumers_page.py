"""Make `docs/readers.md` from the table of consumers:

python -m qlora_rm.exporting.consumers_page > docs/readers.md
"""

from qlora_rm.exporting.consumer import Proof, Reader
from qlora_rm.exporting.consumers import READERS, UNSUPPORTED

HEAD = """\
# Readers of reward models

`qlora-rm export FOLDER --for NAME [NAME ...] --output DIR` writes a folder as these readers want it, scores the golden
items with it as they would, and leaves nothing where a check fails. Weights are linked, not copied, where the disk has
links. FOLDER is what `qlora-rm merge` wrote (for `peft`, what training wrote). The card in DIR (README.md) says how to
load it, `rm_export.json` what was checked.

This page is made from `qlora_rm/exporting/consumers.py`.
"""
FIELDS = (
    ("loads", "loads"),
    ("reads the score at", "reads_at"),
    ("is fed", "fed"),
    ("limits", "limits"),
)
PROOFS: dict[Proof, str] = {
    "run": "the tests run it and compare its scores with the golden ones",
    "re-enacted": "the tests do what its source does, and compare",
    "read": "its source was read; the tests do not run it",
}


def page() -> str:
    """Return the page's text."""
    sections = [_section(reader) for reader in READERS]
    unsupported = "\n".join(f"- `{name}`: {reason}" for name, reason in UNSUPPORTED.items())
    return "\n".join([HEAD, *sections, f"## Not possible\n\n{unsupported}"])


def _section(reader: Reader) -> str:
    lines = [f"- **{title}:** {getattr(reader, field)}" for title, field in FIELDS]
    lines.append(f"- **known by:** {PROOFS[reader.proof]}")
    if reader.architectures is not None:
        names = sorted(name.removesuffix("ForSequenceClassification") for name in reader.architectures)
        lines.append(f"- **architectures:** {', '.join(names)}")
    if reader.unchecked:
        lines.append(f"- **not checked:** {'; '.join(reader.unchecked)}")
    return "\n".join([f"## {reader.name}\n\n{reader.versions}\n", *lines, ""])


if __name__ == "__main__":
    print(page())
