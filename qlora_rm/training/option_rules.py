"""Rules that decide whether an option is obeyed, refused or meaningless here, and the check of a command against them.

`library_options.py` and `project_options.py` hold a rule for every option of `qlora-rm train`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_rm.errors import UserError

Values = Mapping[str, Any]
"""The values of all options of a command, by name, before they are interpreted."""


@dataclass(frozen=True)
class Rule:
    """How one option is handled.

    Attributes:
        kind: obeyed; refused if its value differs from the default; or meaningless here, which is reported.
        why: where it is obeyed, or why it is not.
        remedy: what to do instead, if it is refused or has no effect.
        works: whether it has an effect, given the command's other options; None: always.
        overridden: if it has no effect, another option takes precedence: report that instead of refusing it.
        check: returns what is wrong with a value, or None.
    """

    kind: Literal["obeyed", "refused", "meaningless"]
    why: str
    remedy: str = ""
    works: Callable[[Values], bool] | None = None
    overridden: bool = False
    check: Callable[[Any, Values], str | None] | None = None


def obeyed(where: str, check: Callable[[Any, Values], str | None] | None = None) -> Rule:
    """Rule of an option that the code named in `where` obeys."""
    return Rule("obeyed", where, check=check)


def obeyed_if(
    works: Callable[[Values], bool],
    remedy: str,
    where: str,
    *,
    check: Callable[[Any, Values], str | None] | None = None,
) -> Rule:
    """Rule of an option that has an effect only with certain others; without them it is refused."""
    return Rule("obeyed", where, remedy, works, check=check)


def obeyed_unless(overridden: Callable[[Values], bool], reason: str, where: str) -> Rule:
    """Rule of an option that has an effect unless another takes precedence, which is then reported."""
    return Rule("obeyed", where, reason, lambda values: not overridden(values), overridden=True)


def refused(why: str, remedy: str, check: Callable[[Any, Values], str | None] | None = None) -> Rule:
    """Rule of an option that would do nothing here, or something other than its name promises."""
    return Rule("refused", why, remedy, check=check)


def meaningless(why: str) -> Rule:
    """Rule of an option that does not apply here and changes nothing."""
    return Rule("meaningless", why)


def check_options(rules: Mapping[str, Rule], values: Values, defaults: Values, typed: Collection[str]) -> list[str]:
    """Return notes about options that have no effect.

    Arguments:
        typed: the options that the user gave, on the command line or in the YAML file.

    Raises:
        UserError: all refused options, one per line, each with what to do instead.
    """
    problems, notes = [], []
    for name, rule in rules.items():
        value = values[name]
        differs = not _same(value, defaults[name])
        given = f"--{name} {_word(value)}"
        if rule.kind == "refused" and differs:
            problems.append(f"{given} {rule.why}. {rule.remedy}")
        elif rule.kind == "meaningless" and differs:
            notes.append(f"{given} has no effect: {rule.why}")
        elif rule.works is not None and (differs or name in typed) and not rule.works(values):
            if differs and not rule.overridden:
                problems.append(f"{given} has no effect here. {rule.remedy}")
            elif name in typed:
                notes.append(f"{given} has no effect: {_lower(rule.remedy)}")
        elif rule.check is not None and (problem := rule.check(value, values)):
            problems.append(problem)
    if problems:
        raise UserError("\n".join(problems))
    return notes


def _same(value: Any, default: Any) -> bool:
    """Whether a value means the same as the default; all forms of "nothing" are equal."""
    return value == default or str(value) == str(default) or (_is_nothing(value) and _is_nothing(default))


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, tuple, dict)) and not value)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _lower(sentence: str) -> str:
    plain = sentence.rstrip(".")
    return plain[:1].lower() + plain[1:]
