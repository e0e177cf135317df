"""Every locale and every HOME: all text can be printed, and caches go to a writable folder."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_rm import surroundings
from qlora_rm.errors import UserError
from qlora_rm.output import as_json, json_line, writing
from qlora_rm.surroundings import prepare_caches, prepare_streams, require_readable

TEXT = "Köln 中文 😀 \udce6"
MOVED = ("HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "MPLCONFIGDIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """An environment without our variables, whose HOME and temporary folder are below `tmp_path`."""
    names = {*MOVED, "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "RANK"}
    mine = {name: value for name, value in os.environ.items() if name not in names} | {"HOME": str(tmp_path / "home")}
    monkeypatch.setattr(os, "environ", mine)
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return mine


def stdout_of(monkeypatch: pytest.MonkeyPatch, encoding: str) -> io.BytesIO:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    return written


class TestStreams:
    @pytest.mark.parametrize(
        ("encoding", "shown"),
        [
            ("utf-8", "Köln 中文 😀 \\udce6".encode()),
            ("ascii", "Köln 中文 😀 \\udce6".encode()),  # the C locale: UTF-8, as Python's own UTF-8 mode has it
            ("latin-1", "Köln \\u4e2d\\u6587 \\U0001f600 \\udce6".encode("latin-1")),
            ("gbk", "K\\xf6ln 中文 \\U0001f600 \\udce6".encode("gbk")),
        ],
    )
    def test_every_character_can_be_printed(self, encoding: str, shown: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        written = stdout_of(monkeypatch, encoding)
        prepare_streams()
        print(TEXT)
        assert written.getvalue() == shown + b"\n"

    @pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "gbk"])
    def test_json_is_json_in_every_locale(self, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """JSON must be UTF-8 (RFC 8259); ASCII is valid UTF-8."""
        value = {"a": "Köln 中文 😀"}
        written = stdout_of(monkeypatch, encoding)
        prepare_streams()
        print(as_json(value), end="")
        assert json.loads(written.getvalue().decode("utf-8")) == value
        written = stdout_of(monkeypatch, encoding)
        prepare_streams()
        with writing("-") as output:
            output.write(json_line(value))
        assert written.getvalue().decode("utf-8") == json_line(value)

    def test_words_that_a_locale_cannot_decode_are_refused(self, tmp_path: Path) -> None:
        """Libraries that open files in Rust would fail on them, each with its own error."""
        for folder, word in ((tmp_path, "数据.jsonl"), (tmp_path / "数据", "rows.jsonl")):
            folder.mkdir(exist_ok=True)
            done = subprocess.run(
                [sys.executable, "-m", "qlora_rm", "eval", "model", "--dataset", word],
                cwd=folder,
                env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(Path(__file__).parents[1])},
                capture_output=True,
                encoding="utf-8",
            )
            assert done.returncode == 2, done.stderr
            assert done.stderr.startswith("error: This locale's encoding is ascii, which cannot hold")
            assert "数据" in done.stderr and "Set PYTHONUTF8=1." in done.stderr

    def test_bytes_that_are_no_text_may_name_a_file_where_the_locale_is_utf_8(self) -> None:
        require_readable(["rows-\udcff.jsonl"])

    def test_words_that_a_locale_decodes_are_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "gbk")
        require_readable(["你好"])
        with pytest.raises(UserError, match="encoding is gbk"):
            require_readable(["\udcff"])


class TestCaches:
    def test_a_home_that_can_be_written_is_left_alone(self, environ: Any, tmp_path: Path, capsys: Any) -> None:
        before = dict(environ)
        prepare_caches()
        assert environ == before and capsys.readouterr().err == ""
        assert list((tmp_path / "home").iterdir()) == [], "nothing is left of the trial"

    @pytest.mark.parametrize("home", ["/proc/no_home", "/dev/null", "/proc"], ids=["missing", "a file", "read-only"])
    def test_caches_leave_a_home_that_cannot(self, home: str, environ: Any, tmp_path: Path, capsys: Any) -> None:
        environ["HOME"] = home
        prepare_caches()
        folder = tmp_path / "temporary" / f"qlora_rm-{os.getuid()}"
        assert {name: Path(environ[name]).parent for name in MOVED} == dict.fromkeys(MOVED, folder)
        assert folder.stat().st_mode & 0o077 == 0
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(folder) in said and all(name in said for name in MOVED)
        prepare_caches()
        assert capsys.readouterr().err == "", "once, not in each process that a command starts"

    def test_a_user_without_a_home_has_one(self, environ: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a container whose user is only a number, `~` stays `~`, and libraries would create a folder named so."""
        del environ["HOME"]
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
        monkeypatch.chdir(tmp_path)
        prepare_caches()
        assert Path(environ["HOME"]).is_dir()
        assert not Path("~").exists()

    def test_variables_that_are_set_stay(self, environ: Any) -> None:
        environ |= {"HOME": "/proc/no_home", "MPLCONFIGDIR": "/mine", "XDG_CACHE_HOME": "/tmp"}
        prepare_caches()
        assert environ["MPLCONFIGDIR"] == "/mine"
        assert "TRITON_CACHE_DIR" in environ and not {"HF_HOME", "TORCH_EXTENSIONS_DIR"} & environ.keys()

    def test_a_hub_cache_that_can_only_be_read_is_read(self, environ: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """It may hold models; libraries write elsewhere."""
        hub = Path(environ["HOME"], ".cache", "huggingface")
        hub.mkdir(parents=True)
        monkeypatch.setattr(surroundings, "_can_write", lambda folder: not folder.is_relative_to(environ["HOME"]))
        prepare_caches()
        assert "HF_HOME" not in environ
        assert {"HF_DATASETS_CACHE", "HF_MODULES_CACHE"} < environ.keys()

    def test_somebody_elses_folder_is_not_used(self, environ: Any, tmp_path: Path) -> None:
        """Its owner could put compiled code there that we would load."""
        environ["HOME"] = "/proc/no_home"
        theirs = tmp_path / "temporary" / f"qlora_rm-{os.getuid()}"
        (tmp_path / "trap").mkdir()
        theirs.symlink_to(tmp_path / "trap")
        prepare_caches()
        used = Path(environ["HF_HOME"]).parent
        assert used.is_dir() and used not in (theirs, tmp_path / "trap")
        assert used.stat().st_mode & 0o077 == 0
