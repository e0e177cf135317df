"""Result files appear complete or not at all, and unwritable paths fail at once."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from qlora_rm.errors import UserError
from qlora_rm.output import json_line, writing
from qlora_rm.preferences.row_input import reading


def test_a_file_appears_once_the_block_has_ended_well(tmp_path: Path) -> None:
    target = tmp_path / "scores.jsonl"
    with writing(str(target)) as file:
        file.write("ü\n")
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "ü\n"
    assert list(tmp_path.iterdir()) == [target]


def test_an_older_file_stays_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "scores.jsonl"
    target.write_text("old", encoding="utf-8")
    with suppress(KeyboardInterrupt), writing(str(target)) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_refuses_what_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "file.jsonl"):
        with pytest.raises(UserError, match=str(path)), writing(str(path)):
            pytest.fail("the block must not start")


def test_none_is_a_file_that_nobody_sees(tmp_path: Path) -> None:
    with writing(None) as file:
        file.write("unseen")


def test_reading_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"), reading(str(tmp_path / "rows.jsonl")):
        pytest.fail("the block must not start")


def test_json_lines_hold_any_text() -> None:
    assert json_line({"text": "日本"}) == '{"text": "日本"}\n'
    half = json_line({"text": "\ud800"})
    half.encode()
    assert json.loads(half) == {"text": "\ud800"}
