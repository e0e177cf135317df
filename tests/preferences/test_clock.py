"""A template that reads the clock always renders the moment it was fixed to; other templates are unchanged."""

from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qlora_rm.errors import UserError
from qlora_rm.preferences import clock
from qlora_rm.preferences.clock import fix_date, fixed, fixed_date, now, original, reads_clock
from tests.clocks_for_tests import DAY_OF_TRAINING, DAYS_LATER, READS_CLOCK, set_clock
from tests.tokenizers_for_tests import CHATML, ENDS_WITH_EOS, small_tokenizer

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
READING = {
    "as Llama": READS_CLOCK,
    "day, month and year by name": "{{ strftime_now('%A, %-d. %B %Y') }}",
    "numbers": "{{ strftime_now('%Y-%m-%d') }}",
    "time of day": "{{ strftime_now('%H:%M:%S') }}",
    "by keyword": "{{ strftime_now(format='%d/%m/%y') }}",
    "percent signs": "{{ strftime_now('100%% %d %%d %%%m') }}",
    "flags": "{{ strftime_now('%^a %_d %c %s') }}",
    "made at run time": "{% set parts = ['d', 'm'] %}{% for p in parts %}{{ strftime_now('%' ~ p) }}.{% endfor %}",
    "a variable": "{% set form = '%-d of %B' %}{{ strftime_now(form) }}",
    "another name": "{% set f = strftime_now %}{{ f('%B') }}",
    "inside a macro": "{% macro day() %}{{ strftime_now('%d') }}{% endmacro %}{{ day() }}",
    "in one branch": "{% if messages[0].content == 'Why?' %}{{ strftime_now('%d %b') }}{% else %}no{% endif %}",
    "only with tools": "{% if tools %}{{ strftime_now('%d') }}{% endif %}x",
    "white space first": "\n  {% if true %}\n  a{% endif %}{{ strftime_now('%d') }}\n",
    "generation": "{% generation %}{{ strftime_now('%d') }}{% endgeneration %}",
    "calls and loops": "{% for m in messages %}{{ strftime_now('%d') }}{% break %}{% endfor %}",
}
LEFT_ALONE = {
    "none": None,
    "without a clock": CHATML,
    "ends with eos": ENDS_WITH_EOS,
    "the word in a text": "{{ 'strftime_now' }}{{ messages[0].content }}",
    "a clock of its own": "{% macro strftime_now(f) %}1 May{% endmacro %}{{ strftime_now('%d') }}",
    "a date that rows give": "{{ date_string }}",
    "broken": "{% if %}{{ strftime_now('%d') }}",
}


def rendered(template: str, **more: object) -> str:
    tokenizer = small_tokenizer(chat_template=template)
    return str(tokenizer.apply_chat_template(TURNS, tokenize=False, **more))


@pytest.mark.slow
@pytest.mark.parametrize("template", READING.values(), ids=READING)
def test_a_fixed_template_renders_that_moment_on_any_day(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    set_clock(monkeypatch, DAY_OF_TRAINING)
    then = rendered(template), rendered(template, tools=tools)
    written = fixed(template, now())
    set_clock(monkeypatch, DAYS_LATER)
    assert (rendered(template), rendered(template, tools=tools)) != then, "the template must read the clock"
    assert (rendered(str(written)), rendered(str(written), tools=tools)) == then
    assert reads_clock(template) and not reads_clock(written)
    assert original(written) == template
    assert fixed(written, DAYS_LATER) == written, "what is fixed stays"


@pytest.mark.parametrize("template", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_other_templates_are_left_byte_for_byte(template: str | None) -> None:
    tokenizer = small_tokenizer(chat_template=template)
    assert fix_date(tokenizer, DAY_OF_TRAINING) is None
    assert tokenizer.chat_template == template == original(template)
    assert fixed_date(template) is None


def test_the_moment_is_a_day_unless_the_time_is_read() -> None:
    assert fixed_date(fixed(READS_CLOCK, DAY_OF_TRAINING)) == "2024-07-26"
    assert fixed_date(fixed(READING["time of day"], DAY_OF_TRAINING)) == "2024-07-26T23:59:30"


def test_of_several_templates_those_that_read_the_clock_are_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, DAY_OF_TRAINING)
    tokenizer = small_tokenizer(chat_template={"default": READS_CLOCK, "plain": CHATML, "tool_use": READING["numbers"]})  # type: ignore[arg-type]
    then = tokenizer.apply_chat_template(TURNS)["input_ids"], tokenizer.apply_chat_template(TURNS, tools=[{}])
    assert fix_date(tokenizer, now()) == "2024-07-26"
    assert tokenizer.chat_template["plain"] == CHATML
    tokenizer.save_pretrained(tmp_path)
    set_clock(monkeypatch, DAYS_LATER)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert (read.apply_chat_template(TURNS)["input_ids"], read.apply_chat_template(TURNS, tools=[{}])) == then


def test_a_rows_own_date_still_counts() -> None:
    assert "1 May" in rendered(str(fixed(READS_CLOCK, DAY_OF_TRAINING)), date_string="1 May")


@pytest.mark.slow
@given(st.datetimes(datetime(1970, 1, 2), datetime(2099, 12, 31)))
def test_any_moment(moment: datetime) -> None:
    written = str(fixed("{{ strftime_now('%a %d %b %Y, %j, week %U, %I %p') }}", moment))
    assert rendered(written) == moment.strftime("%a %d %b %Y, %j, week %U, %I %p")


def test_what_renders_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_prefix", lambda template, when: "wrong ")
    with pytest.raises(UserError, match=r"cannot be fixed to one date.*--chat_template_path"):
        fixed(READS_CLOCK, DAY_OF_TRAINING)
