"""Generator of docs/options.md, which lists how `qlora-rm train` handles every option, from the rules it is checked by.

python -m qlora_rm.training.options_page > docs/options.md
"""

from qlora_rm.training.library_options import LIBRARY
from qlora_rm.training.option_rules import Rule
from qlora_rm.training.project_options import PROJECT

HEAD = """# Options of qlora-rm train

`qlora-rm train` takes this project's options, those of TRL's `RewardConfig` and those of transformers'
`TrainingArguments`. An option that would do nothing, or something else than it says, is refused before anything is
loaded, with what to use instead. An option that another one overrides, or that asks for nothing here, is reported in one
line. `qlora-rm train --help_all` explains the options. This page is made by `python -m qlora_rm.training.options_page`.
"""


def page() -> str:
    """Return the complete page."""
    rules = {"This project's options": PROJECT, "Options of TRL and transformers": LIBRARY}
    lines = [HEAD]
    for title, table in rules.items():
        works = {name: rule for name, rule in table.items() if rule.kind == "obeyed"}
        lines += [f"## {title}", "", "| option | obeyed by | otherwise |", "|---|---|---|"]
        lines += [f"| `{name}` | {rule.why} | {_otherwise(rule)} |" for name, rule in works.items()]
        lines.append("")
    refused = {name: rule for name, rule in LIBRARY.items() if rule.kind == "refused"}
    lines += ["## Refused", "", "| option | why | instead |", "|---|---|---|"]
    lines += [f"| `{name}` | {rule.why} | {rule.remedy} |" for name, rule in refused.items()]
    idle = {name: rule for name, rule in LIBRARY.items() if rule.kind == "meaningless"}
    lines += ["", "## Without an effect here", "", "| option | why |", "|---|---|"]
    lines += [f"| `{name}` | {rule.why} |" for name, rule in idle.items()]
    return "\n".join(lines) + "\n"


def _otherwise(rule: Rule) -> str:
    """Return what is reported if other options leave this one without effect."""
    return rule.remedy[:1].upper() + rule.remedy[1:]


if __name__ == "__main__":
    print(page(), end="")
