"""Another day: the clock that transformers gives to chat templates, turned."""

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
"""As Llama 3's, in small."""


def set_clock(monkeypatch: pytest.MonkeyPatch, moment: datetime) -> None:
    """What `strftime_now` of every template reads from now on."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return moment

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
