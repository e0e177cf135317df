"""Chat templates rendered within limits of time and size.

A chat template is a program. jinja's sandbox keeps it from files and processes, but not from endless loops, nor from
texts of gigabytes, which a single operation can make. This environment checks the size of a result before an operation
that multiplies, adds up the sizes of all results, and checks the clock in every loop and call. After `bound_templates`,
transformers renders all chat templates with it.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache, lru_cache, wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.environment import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from qlora_rm.preferences.template_code import LITERAL, LOOP, Generator, watched
from qlora_rm.preferences.template_sizes import FILTERS, METHODS, NUMBER, TooLarge, formatted, weight

SECONDS = 5.0
"""Processor time of this thread that one rendering may take."""

WASTED = 30.0
"""Total seconds that failed renderings of one template may take; after that it is not rendered again."""

LARGEST = 100_000_000
"""Limit of one text in characters, and of one list in entries and characters."""

TOTAL = 400_000_000
"""Limit of all operations of one rendering together, in characters and entries."""

LONGEST_TEMPLATE = 1_000_000
"""Limit of a template in characters. The largest known templates have 100,000."""

BITS = 10_000
"""Limit of an integer in bits."""

LOOKS = 32
"""Steps between two checks of the clock."""

LINEAR = ("trim", "upper", "lower", "capitalize", "title", "safe", "list", "items", "reverse", "int", "float", "abs")
"""Filters whose result is about as long as their input."""

LAZY = ("default", "d", "length", "count", "first", "last", "map", "select", "selectattr", "reject", "rejectattr")
"""Filters that create no large result themselves, and so need no limit."""


class OutOfTime(TemplateError):
    """A rendering that took too long."""


class _Budget:
    """The time and size that one rendering has left."""

    __slots__ = ("ends", "left", "steps")

    def __init__(self) -> None:
        self.left, self.steps, self.ends = TOTAL, 0, time.thread_time() + SECONDS

    def tick(self) -> None:
        self.steps += 1
        if not self.steps % LOOKS:
            self.look()

    def look(self) -> None:
        if time.thread_time() > self.ends:
            raise OutOfTime(f"the template took more than {SECONDS:g} s")

    def spend(self, size: int) -> None:
        self.tick()
        self.left -= size
        if size > LARGEST or self.left < 0:
            raise TooLarge(size if size > LARGEST else TOTAL)


class _Now(threading.local):
    budget: _Budget | None = None


_now = _Now()


def _budget() -> _Budget:
    """Return the budget of this thread's rendering; a new one outside of a rendering, while a template is compiled."""
    return _now.budget or _Budget()


def _counted(value: Any) -> Any:
    """Charge an operation's result to the budget and return it."""
    kind = type(value)
    if kind is str or kind is bytes or kind is list or kind is tuple:
        _budget().spend(len(value))
    elif kind is int and value.bit_length() > BITS:
        raise TooLarge(value.bit_length())
    return value


def _small(value: Any) -> Any:
    """Charge a new list, tuple or object with all its contents, each as often as it occurs, and return it."""
    _budget().spend(weight(value, LARGEST))
    return value


class _Ticked:
    """The iterable of a loop; its steps check the clock."""

    def __init__(self, inner: Iterable[Any]) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        budget = _budget()
        for item in self.inner:
            budget.steps += 1
            if not budget.steps % LOOKS:
                budget.look()
            yield item

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]  # a TypeError where it has none, as without this class


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        formatted(format_spec, (value,), LARGEST)
        return super().format_field(value, format_spec)


class _Template(Template):
    """A template whose renderings each have their own budget, kept per thread."""

    wasted = 0.0

    def render(self, *args: Any, **kwargs: Any) -> str:
        if self.wasted > WASTED:
            raise OutOfTime(
                f"consecutive renderings of this template that failed took more than {WASTED:g} s; it is not rendered any more"
            )
        before, _now.budget = _now.budget, _Budget()
        try:
            text = super().render(*args, **kwargs)
            self.wasted = 0.0
            return text
        except (OutOfTime, TooLarge):
            self.wasted += time.thread_time() - (_now.budget.ends - SECONDS)
            raise
        finally:
            _now.budget = before


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = Generator
    template_class = _Template
    intercepted_binops = frozenset({"+", "*", "%", "**"})  # otherwise jinja computes them while it compiles a template

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        whole = parts if isinstance(parts, list) else list(parts)
        _budget().spend(sum(map(len, whole)))
        return "".join(whole)

    @staticmethod
    def added(parts: tuple[Any, ...]) -> Any:
        """Compute `+` from left to right."""
        found = parts[0]
        for part in parts[1:]:
            before, found = found, found + part
            if type(found) is not str:
                grown = isinstance(found, (list, tuple)) and len(found).bit_length() > len(before).bit_length()
                _small(found) if grown else _counted(found)  # a growing list is counted when its length doubles
            elif len(found) > LARGEST:
                raise TooLarge(len(found))
        if type(found) is str:
            budget = _now.budget or _Budget()
            budget.left -= len(found)
            if budget.left < 0:
                raise TooLarge(TOTAL)
        return found

    def joined(self, parts: tuple[Any, ...]) -> str:
        """Compute `~`."""
        return self.concat([part if type(part) is str else str(_printable(part)) for part in parts])

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return _counted(value[start:stop:step])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            sizes = [one.bit_length() if type(one) is int else 0 for one in (left, right)]
            length = next((len(one) for one in (left, right) if isinstance(one, (str, bytes, list, tuple))), None)
            if length is None and sum(sizes) > BITS:
                raise TooLarge(sum(sizes))
            times = next((one for one in (left, right) if isinstance(one, int)), 0)
            if length is not None and length * times > LARGEST:
                raise TooLarge(length * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if right > BITS or left.bit_length() * right > BITS:
                raise TooLarge(left.bit_length() * right)
        elif operator == "%" and isinstance(left, (str, bytes)):
            formatted(left, right, LARGEST)
        found = super().call_binop(context, operator, left, right)
        return _small(found) if isinstance(found, (list, tuple)) else _counted(found)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _require_modest(__obj, args, kwargs)
        found = super().call(__context, __obj, *args, **kwargs)
        return _small(found) if type(found) is dict else _counted(found)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return `str.format` with a check of its field widths."""
        if super().wrap_str_format(value) is None:
            return None
        text, by_map = value.__self__, value.__name__ == "format_map"

        def bounded(*args: Any, **kwargs: Any) -> str:
            if by_map:
                args, kwargs = (), *args
            formatted(text, (args, kwargs), LARGEST, mark="{")
            return type(text)(_Formatter(self).vformat(text, args, kwargs))

        return wraps(value)(bounded)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(watched(source), *args, **kwargs)


def _require_modest(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Reject arguments of a built-in method that are too large a width or count, or that make a text too long."""
    owner = getattr(function, "__self__", None)
    if owner is None or isinstance(owner, type(threading)):
        return
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > NUMBER:
            raise TooLarge(abs(value))
    if isinstance(owner, (str, bytes)) and (bound := METHODS.get(getattr(function, "__name__", ""))):
        bound(LARGEST, owner, *args, **kwargs)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if name in LAZY:
        return function
    if name in LINEAR:
        return wraps(function)(lambda *args, **kwargs: _counted(function(*args, **kwargs)))
    bound, given = FILTERS.get(name), 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args[given + 1 :], *kwargs.values()):
            if isinstance(value, int) and abs(value) > NUMBER:
                raise TooLarge(abs(value))
        if bound is not None:
            bound(LARGEST, *args[given:], **kwargs)
        return _counted(function(*args, **kwargs))

    return bounded


def _printable(value: Any) -> Any:
    """Check that the text of `value` is not too long, and return `value`."""
    if type(value) is str:
        return value
    if isinstance(value, (Mapping, Collection, Namespace)) and not isinstance(value, str):
        _budget().spend(weight(value, LARGEST))
    return value


@lru_cache(maxsize=64)
def compiled(template: str) -> Template:
    """Compile a template in an environment like transformers' own, with limits.

    Raises:
        TemplateError: the template is too long or invalid.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise TemplateError(f"the template has {len(template):,} characters; at most {LONGEST_TEMPLATE:,} are rendered")
    theirs = _environment_of_transformers()
    kinds = [type(extension) for extension in theirs.extensions.values()]
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=kinds, finalize=_printable)
    environment.globals.update(theirs.globals)
    environment.globals.pop("lipsum", None)  # writes any amount of placeholder text, and no chat template needs it
    environment.filters.update({name: _bounded_filter(name, function) for name, function in theirs.filters.items()})
    environment.filters |= {LOOP: _Ticked, LITERAL: _small}
    return environment.from_string(template)


@cache
def _environment_of_transformers() -> Any:
    from transformers.utils import chat_template_utils

    return chat_template_utils._cached_compile_jinja_template("").environment


def bound_templates() -> None:
    """Make transformers render all chat templates in this process within limits.

    transformers 5.23 has neither limits nor a way to choose the environment, so this replaces its cached compiler.
    Remove once it has one of them.
    """
    from transformers.utils import chat_template_utils

    chat_template_utils._compile_jinja_template = compiled
