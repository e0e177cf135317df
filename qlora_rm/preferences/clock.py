"""Fixed dates for chat templates that read the clock (`strftime_now`, Llama 3.1 and later).

A fixed template is the original one after a macro of that name, which always returns one moment. Every consumer of the
saved tokenizer then renders that moment, with no argument and on any day. A template that does not read the clock stays
the same, byte for byte.
"""

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.meta import find_undeclared_variables

from qlora_rm.errors import UserError, first_line
from qlora_rm.preferences.bounded_templates import compiled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = str | dict[str, str]
"""A tokenizer's chat template, or several by name."""

CLOCK = "strftime_now"
MARK = "{#- qlora_rm: the date of this template is "
END = "{%- endmacro %}\n"
_FIXED = re.compile(re.escape(MARK) + r"(\S+) -#\}.*?" + re.escape(END), re.DOTALL)
_CODE = re.compile(r"%[-_0^#+]*\d*[EO]?[A-Za-z%]")
_LETTERS = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
PERCENT = "\x00"  # stands for a literal % until every other code is replaced


def now() -> datetime:
    """Return the current time, to the second, from the clock that transformers gives to templates."""
    clock = _environment("").globals[CLOCK]
    return datetime.fromisoformat(clock("%Y-%m-%dT%H:%M:%S"))


def reads_clock(template: Template | None) -> bool:
    """Return whether any of the templates reads the clock, in any branch."""
    return any(map(_reads_clock, _texts(template)))


def fixed(template: Template, when: datetime) -> Template:
    """Return the template with the clock fixed to `when`.

    Raises:
        UserError: the fixed template does not render what the original renders at that moment.
    """
    if isinstance(template, dict):
        return {name: str(fixed(text, when)) for name, text in template.items()}
    if not _reads_clock(template):
        return template
    written = _prefix(template, when) + template
    _require_same(template, written, when)
    return written


def original(template: Template | None) -> Template | None:
    """Return the template as it was before its date was fixed."""
    if isinstance(template, dict):
        return {name: str(original(text)) for name, text in template.items()}
    return _FIXED.sub("", template, count=1) if template and _FIXED.match(template) else template


def fixed_date(template: Template | None) -> str | None:
    """Return the moment, in ISO format, that the template was fixed to; None if it was not fixed."""
    found = [match[1] for match in map(_FIXED.match, _texts(template)) if match]
    return max(found, key=len, default=None)  # of several, the longest, which includes the time of day


def fix_date(tokenizer: "PreTrainedTokenizerBase", when: datetime) -> str | None:
    """Fix the tokenizer's template to `when`; return the date, or None if no template reads the clock."""
    if not reads_clock(tokenizer.chat_template):
        return None
    tokenizer.chat_template = fixed(tokenizer.chat_template, when)
    return fixed_date(tokenizer.chat_template)


def rendering_at(template: str) -> Callable[..., str]:
    """Return a function that renders `template` as if the time were its argument `when`."""
    compiled = _compiled(template)

    def render(when: datetime, **variables: Any) -> str:
        return compiled.render({CLOCK: lambda format: when.strftime(format), **variables})

    return render


def _texts(template: Template | None) -> list[str]:
    return list(template.values()) if isinstance(template, dict) else [template] if template else []


def _compiled(template: str) -> Any:
    return compiled(template)


def _environment(template: str) -> Any:
    return _compiled(template).environment


def _reads_clock(template: str) -> bool:
    if CLOCK not in template:
        return False
    try:
        environment = _environment(template).overlay()
        # jinja's "undeclared" variables exclude globals
        environment.globals = {name: value for name, value in environment.globals.items() if name != CLOCK}
        return CLOCK in find_undeclared_variables(environment.parse(template))
    except (TemplateError, RecursionError):  # a broken template fails where it is first rendered
        return False


def _prefix(template: str, when: datetime) -> str:
    """Return a macro with the clock's name that replaces the format's codes; defining it writes no output.

    transformers' `trim_blocks` removes the line break at its end. The template therefore still begins a line, which
    `lstrip_blocks` depends on.
    """
    codes = _codes(template)
    midnight = when.replace(hour=0, minute=0, second=0, microsecond=0)
    is_a_day = all(when.strftime(code) == midnight.strftime(code) for code in codes)
    moment = midnight.date().isoformat() if is_a_day else when.isoformat()
    filters = "".join(f" | replace({_literal(code)}, {_literal(value)})" for code, value in _values(codes, when))
    return f"{MARK}{moment} -#}}{{%- macro {CLOCK}(format) %}}{{{{- format{filters} }}}}{END}"


def _codes(template: str) -> list[str]:
    """Return the codes in the formats passed to the clock; all existing codes if a format is computed at run time."""
    tree = _environment(template).parse(template)
    calls = [call for call in tree.find_all(nodes.Call) if _is_clock(call.node)]
    given = [value for call in calls for value in (*call.args, *(pair.value for pair in call.kwargs))]
    tests = sum(_is_clock(test.node) for test in tree.find_all(nodes.Test))
    uses = sum(_is_clock(name) and name.ctx == "load" for name in tree.find_all(nodes.Name))
    if uses == len(calls) + tests and all(isinstance(value, nodes.Const) for value in given):
        return list(dict.fromkeys(code for value in given for code in _CODE.findall(str(value.value))))
    constants = [str(node.value) for node in tree.find_all(nodes.Const)]
    written = (code for text in constants for code in _CODE.findall(text))
    return list(dict.fromkeys(["%%", *written, *(f"%{flag}{letter}" for flag in ("", "-") for letter in _LETTERS)]))


def _is_clock(node: Any) -> bool:
    return isinstance(node, nodes.Name) and node.name == CLOCK


def _values(codes: list[str], when: datetime) -> Iterator[tuple[str, str]]:
    """Yield each code and its replacement, in the order to apply: %% first, so that "%%d" does not become a day."""
    if "%%" in codes:
        yield "%%", PERCENT
    yield from ((code, when.strftime(code)) for code in codes if code != "%%")
    if "%%" in codes:
        yield PERCENT, "%"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_USER = {"role": "user", "content": "Why?"}
_ASSISTANT = {"role": "assistant", "content": "So."}
_SYSTEM = {"role": "system", "content": "Be brief."}
_TOOLS = [{"type": "function", "function": {"name": "look", "description": "?", "parameters": {}}}]
PROBES = tuple(
    {"messages": messages, "tools": tools, "add_generation_prompt": answering, "bos_token": "<s>", "eos_token": "</s>"}
    for messages in ([_USER, _ASSISTANT], [_SYSTEM, _USER, _ASSISTANT], [_USER])
    for tools in (None, _TOOLS)
    for answering in (False, True)
)


def _require_same(template: str, written: str, when: datetime) -> None:
    for probe in PROBES:
        before = _rendered(partial(rendering_at(template), when, **probe))
        after = _rendered(partial(_compiled(written).render, **probe))
        if before != after:
            raise UserError(
                f"The chat template reads the clock in a way that cannot be fixed to one date: it renders {before!r:.80} "
                f"and, fixed, {after!r:.80}. Pass --chat_template_path with a template that does not use {CLOCK}."
            )


def _rendered(render: Callable[[], str]) -> str:
    """Return the rendering, or the error, which the fixed template must then raise too."""
    try:
        return render()
    except Exception as error:  # a template is a program
        return f"{type(error).__name__}: {first_line(error)}"
