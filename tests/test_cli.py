"""The commands: fast help, results on stdout, errors in one line, exit statuses."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.cli import main
from qlora_rm.merging.merge import merge
from tests.reward_models_for_tests import copy_of, edit_json, llama_adapter, seal_again

COMMANDS = ("train", "plan", "eval", "score", "merge", "export", "verify", "serve", "recipes", "demo")
ROWS = [
    {"prompt": "What? ", "chosen": "Paris.", "rejected": "No.", "source": "a"},
    {"prompt": "Where? ", "chosen": "In Köln.", "rejected": "The dog does not mind.", "source": "b"},
]


def run(*words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process."""
    command = [sys.executable, "-m", "qlora_rm.cli", *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=Path(__file__).parents[1], **settings)


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def adapter() -> str:
    return str(llama_adapter())


def processor_seconds() -> float:
    """Return the CPU seconds of all child processes so far; unlike wall time, they do not depend on other load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_answers_in_under_a_second(command: str) -> None:
    began = processor_seconds()
    done = run(*command.split(), "--help")
    took = processor_seconds() - began
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: qlora-rm {command}".rstrip())
    assert took < 1, f"{took:.2f} s"


def test_help_loads_no_library() -> None:
    code = (
        "import sys, contextlib, qlora_rm.cli as cli\n"
        f"for command in {COMMANDS}:\n"
        "    with contextlib.suppress(SystemExit): cli.main([command, '--help'])\n"
        "print('loaded', sorted({'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.stdout.endswith("loaded []\n"), done.stderr


def test_help_describes_every_option_and_its_default() -> None:
    text = " ".join(run("train", "--help", env={**os.environ, "COLUMNS": "200"}).stdout.split())
    assert "--no_use_lora" in text
    assert "Rank of the adapter. [16]" in text
    assert "train[:1%] work. [train]" in text
    assert "{none,4bit,8bit}" in text
    assert "--help_all" in text


def test_version() -> None:
    assert run("--version").stdout.startswith("qlora-rm 0.")


class TestEval:
    def test_prints_a_table_and_writes_json(self, adapter: str, rows: str, tmp_path: Path, capsys: Any) -> None:
        output = tmp_path / "evaluation.json"
        assert main(["eval", adapter, "--dataset", rows, "--output", str(output)]) == 0
        printed = capsys.readouterr()
        assert printed.out.splitlines()[0].split()[:3] == ["source", "wins", "accuracy"]
        assert [line.split()[0] for line in printed.out.splitlines()[2:5]] == ["all", "a", "b"]
        assert "2 rows read" in printed.err
        result = json.loads(output.read_text(encoding="utf-8"))
        assert result["overall"]["wins"] == 2
        assert result["data"]["parts"]["comparisons"]["comparisons"] == 2

    @pytest.mark.slow
    def test_as_a_process_with_json(self, adapter: str, rows: str) -> None:
        done = run("eval", adapter, "--dataset", rows, "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["responses"] == 4
        assert set(result["by_source"]) == {"a", "b"}

    def test_skips_and_counts_bad_rows(self, adapter: str, tmp_path: Path, capsys: Any) -> None:
        path = write_rows(tmp_path / "bad.jsonl", [*ROWS, {"prompt": "x", "chosen": True, "rejected": "y"}])
        assert main(["eval", adapter, "--dataset", path]) == 2
        assert "row 3: chosen is a boolean" in capsys.readouterr().err
        assert main(["eval", adapter, "--dataset", path, "--on_bad_row", "skip", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["data"]["read"]["data"]["skipped"]["wrong_type"]["count"] == 1


class TestScore:
    def test_a_file(self, adapter: str, rows: str, tmp_path: Path, capsys: Any) -> None:
        output = tmp_path / "scored.jsonl"
        assert main(["score", adapter, "--input", rows, "--output", str(output)]) == 0
        scored = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert [row["chosen"] for row in scored] == ["Paris.", "In Köln."]
        assert all(len(row["scores"]) == 2 for row in scored)
        assert "2 of 2 rows scored" in capsys.readouterr().err

    @pytest.mark.slow
    def test_standard_input_and_output(self, adapter: str) -> None:
        lines = [
            '{"prompt": "What? ", "response": "Köln"}',
            "{",
            '{"text": "\ud800"}'.encode("ascii", "backslashreplace").decode(),
        ]
        done = run("score", adapter, "--input", "-", "--on_bad_row", "skip", input="\n".join(lines))
        assert done.returncode == 0, done.stderr
        scored = [json.loads(line) for line in done.stdout.splitlines()]
        assert isinstance(scored[0]["score"], float)
        assert [row.get("score") for row in scored[1:]] == [None, None]
        assert scored[2]["text"] == "\ud800"
        assert "1 of 3 rows scored" in done.stderr
        assert "skipped 1 x broken_json" in done.stderr
        assert "skipped 1 x bad_unicode" in done.stderr

    def test_bytes_that_are_no_text_are_a_fault_of_their_row(self, adapter: str, tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b'{"text": "\xff"}\n')
        assert main(["score", adapter, "--input", str(path)]) == 2
        assert "row 1: the row is not JSON (byte 10 is not UTF-8)" in capsys.readouterr().err

    def test_ranks_responses(self, adapter: str, capsys: Any) -> None:
        words = ["score", adapter, "--prompt", "What?", "--responses", "Paris.", "No.", "The " + "very " * 30 + "end"]
        assert main(words) == 0
        table = capsys.readouterr().out.splitlines()
        assert len(table) == 5
        assert max(map(len, table)) < 80
        assert main([*words, "--json"]) == 0
        ranked = json.loads(capsys.readouterr().out)
        assert [row["rank"] for row in ranked] == [1, 2, 3]
        assert f"{ranked[0]['score']:.4f}" in table[2]

    def test_output_is_not_left_half_written(self, adapter: str, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "rows.jsonl", [*({"text": "a"} for _ in range(300)), {"no": 1}])
        assert main(["score", adapter, "--input", path, "--output", str(tmp_path / "scored.jsonl")]) == 2
        assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]

    @pytest.mark.slow
    def test_a_closed_pipe_is_quiet(self, adapter: str, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "rows.jsonl", [{"text": "a" * 500} for _ in range(600)])
        command = [sys.executable, "-m", "qlora_rm.cli", "score", adapter, "--input", path]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        process.stderr.close()
        assert process.wait() == 1
        assert "Traceback" not in error
        assert "BrokenPipe" not in error


class TestMergeAndVerify:
    @pytest.mark.long
    @pytest.mark.slow
    def test_the_road_from_adapter_to_proof(self, adapter: str, tmp_path: Path) -> None:
        merged = str(tmp_path / "merged")
        done = run("merge", adapter, "--output", merged, "--dtype", "fp32")
        assert done.returncode == 0, done.stderr
        assert "scores differ from the golden ones by" in done.stdout
        done = run("verify", merged)
        assert done.returncode == 0, done.stdout
        assert "checks hold" in done.stdout
        assert "FAIL" not in done.stdout

    @pytest.mark.slow
    def test_a_failing_check_is_status_1(self, tmp_path: Path, capsys: Any) -> None:
        folder = tmp_path / "merged"
        merge(str(llama_adapter()), str(folder), dtype="fp32")
        edit_json(folder / "config.json", pad_token_id=5)
        assert main(["verify", str(folder)]) == 1
        assert "FAIL  model pads as the tokenizer does" in capsys.readouterr().out
        assert main(["verify", str(folder), "--json"]) == 1
        result = json.loads(capsys.readouterr().out)
        assert result["ok"] is False
        assert any(not check["ok"] for check in result["checks"])

    def test_another_base_can_be_named(self, tmp_path: Path, capsys: Any) -> None:
        folder = copy_of(llama_adapter(), tmp_path / "adapter")
        base = Manifest.load(folder).base
        edit_json(folder / "rm_manifest.json", base={**vars(base), "name_or_path": str(tmp_path / "gone")})
        edit_json(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
        seal_again(folder)
        assert main(["verify", str(folder)]) == 2
        assert "--base" in capsys.readouterr().out
        assert main(["verify", str(folder), "--base", base.name_or_path]) == 0


@pytest.mark.slow
def test_export_to_4_bit_counts_what_it_costs(rows: str, tmp_path: Path, capsys: Any) -> None:
    merged, small = str(tmp_path / "merged"), str(tmp_path / "small")
    merge(str(llama_adapter()), merged, dtype="fp32")
    assert main(["export", merged, "--to-4bit", "--output", small, "--dataset", rows, "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["golden"]["scores"] > 0 and counted["yours"]["pairs"] == len(ROWS)
    assert main(["verify", small]) == 0
    assert Manifest.load(small).history[-1].name == "requantize"
    capsys.readouterr()
    assert main(["export", small, "--to-4bit", "--output", str(tmp_path / "again")]) == 2
    assert "is in 4 bit already" in capsys.readouterr().err


MISTAKES: list[tuple[list[str], str]] = [
    ([], "COMMAND"),
    (["evaluate", "x"], "invalid choice: 'evaluate'"),
    (["eval", "ADAPTER"], "--dataset"),
    (["eval", "ADAPTER", "--dataset", "MISSING.jsonl"], "MISSING.jsonl"),
    (["eval", "ADAPTER", "--dataset", "ROWS", "--output", "MISSING/x.json"], "MISSING/x.json cannot be written"),
    (["eval", "ADAPTER", "--dataset", "ROWS", "--colour", "red"], "unknown option --colour"),
    (["eval", "ADAPTER", "--dataset", "ROWS", "--columns", "prompt"], "field=column"),
    (["eval", "ADAPTER", "--dataset", "ROWS", "--tokens_per_batch", "0"], "--tokens_per_batch 0"),
    (["eval", "./MISSING", "--dataset", "ROWS"], "There is no folder ./MISSING"),
    (["eval", "BASE", "--dataset", "ROWS"], "has no score head"),
    (["score", "ADAPTER"], "--input FILE"),
    (["score", "ADAPTER", "--input", "ROWS", "--prompt", "x"], "one of the two"),
    (["score", "ADAPTER", "--prompt", "x"], "--responses"),
    (
        ["score", "ADAPTER", "--prompt", "x", "--responses", "a", "--output", "OUT"],
        "--output has no effect with --prompt",
    ),
    (["score", "ADAPTER", "--input", "ROWS", "--json"], "--json has no effect with --input"),
    (["score", "ADAPTER", "--input", "MISSING.jsonl"], "MISSING.jsonl cannot be read"),
    (["score", "ADAPTER", "--input", "ROWS", "--output", "."], "is a folder"),
    (["score", "ADAPTER", "--input", "ROWS", "--on_bad_row", "ignore"], "invalid choice: 'ignore'"),
    (["merge", "ADAPTER"], "--output"),
    (["merge", "BASE", "--output", "OUT"], "already is one whole model"),
    (["merge", "ADAPTER", "--output", "OUT", "--dtype", "fp8"], "invalid choice: 'fp8'"),
    (["verify", "./MISSING"], "There is no folder ./MISSING"),
    (["verify", "ADAPTER", "--url", "somewhere:80"], "--url somewhere:80 must begin with http://"),
    (
        ["verify", "ADAPTER", "--url", "http://127.0.0.1", "--token_file", "MISSING"],
        "--token_file MISSING cannot be read",
    ),
    (["verify", "BASE", "--url", "http://127.0.0.1"], "has no rm_manifest.json"),
    (["serve", "./MISSING"], "There is no folder ./MISSING"),
    (["export", "ADAPTER", "--output", "OUT"], "--for NAME, or --to-4bit"),
    (["export", "ADAPTER", "--for", "peft", "--to-4bit", "--output", "OUT"], "one of the two"),
    (["export", "ADAPTER", "--for", "peft", "--output", "OUT", "--dataset", "ROWS"], "--dataset is what --to-4bit"),
    (["export", "ADAPTER", "--to-4bit", "--output", "OUT"], "Merge it first"),
    (["export", "ADAPTER", "--for", "trl", "--output", "OUT"], "qlora-rm merge"),
    (["export", "./MISSING", "--for", "trl", "--output", "OUT"], "There is no folder ./MISSING"),
    (["export", "ADAPTER", "--for", "tei", "--output", "OUT"], "encoder classifiers only"),
    (["export", "BASE", "--for", "vllm", "--output", "OUT"], "has no score head"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(words) or "nothing" for words, _ in MISTAKES])
def test_mistakes_are_told_in_one_line(
    words: list[str], message: str, rows: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"ADAPTER": str(llama_adapter()), "BASE": str(llama_adapter().parent / "base"), "ROWS": rows}
    assert main([places.get(word, word) for word in words]) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert printed.err.splitlines()[-1] == errors[0]
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_unwritable_outputs_are_refused_before_the_model_is_loaded(rows: str, tmp_path: Path, capsys: Any) -> None:
    nowhere, no_model = str(tmp_path / "missing" / "out"), str(tmp_path / "no_model")
    for words in (["eval", no_model, "--dataset", rows], ["score", no_model, "--input", rows]):
        assert main([*words, "--output", nowhere]) == 2
        assert "cannot be written" in capsys.readouterr().err


@pytest.mark.slow
def test_mistakes_have_no_traceback_as_a_process(tmp_path: Path) -> None:
    done = run("verify", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_rm.verification.folder.verify", interrupt)
    assert main(["verify", "x"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("qlora_rm.verification.folder.verify", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["verify", "x"])


def test_train_and_demo_hand_their_words_on(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr("qlora_rm.training.run.main", heard.append)
    monkeypatch.setattr("qlora_rm.demo.walk.demo", lambda **settings: heard.append(settings))
    assert main(["train", "--config", "x.yaml", "--learning_rate", "1e-4"]) == 0
    assert main(["train", "--help_all"]) == 0
    assert main(["demo", "--only-make"]) == 0
    assert heard == [["--config", "x.yaml", "--learning_rate", "1e-4"], ["--help"], {"only_make": True}]
