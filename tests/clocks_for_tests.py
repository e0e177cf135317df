"""A fake date for the clock that transformers gives to chat templates."""

from datetime import datetime

import pytest

DAY_OF_TRAINING = datetime(2024, 7, 26, 23, 59, 30)
DAYS_LATER = datetime(2025, 3, 1, 0, 0, 1)

READS_CLOCK = """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 1999" %}
    {%- endif %}
{%- endif %}
{{- "<|im_start|>system\\nToday Date: " + date_string + "<|im_end|>\\n" }}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- endfor %}
"""
"""A short version of Llama 3's template."""


def set_clock(monkeypatch: pytest.MonkeyPatch, moment: datetime) -> None:
    """Set the time that `strftime_now` returns in every template."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return moment

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
