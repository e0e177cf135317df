"""The output for people: the command's, the page, and the memory of real runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scale_page
from benchmarks.memory import GIVES_BACK
from qlora_rm.cli import main
from qlora_rm.planning.memory import Memory
from tests.models_for_tests import save_backbone
from tests.tokenizers_for_tests import small_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCALE = json.loads((scale_page.RESULTS / "scale.json").read_text())
MEASURED = json.loads((scale_page.RESULTS / "memory_cpu.json").read_text())


def test_the_page_is_what_the_results_say() -> None:
    assert scale_page.PAGE.read_text(encoding="utf-8") == scale_page.render(SCALE, MEASURED)


@pytest.mark.long
@pytest.mark.slow
def test_the_results_are_what_the_planner_says() -> None:
    assert json.loads(json.dumps(scale_page.plan("8x7B"))) == SCALE["8x7B"]


def test_predictions_are_within_a_tenth_of_the_measurements() -> None:
    assert len(MEASURED["runs"]) >= 8
    for name, run in MEASURED["runs"].items():
        assert 0.9 < run["predicted"] / run["measured"]["training"] < 1.1, name


@pytest.mark.long
@pytest.mark.slow
def test_a_real_run_takes_what_was_predicted() -> None:
    """Two train steps, without and with checkpointing, in processes that `benchmarks.memory` forks."""
    code = (
        "import json, benchmarks.memory as m\n"
        "runs = [m.Run('qwen2 1024x6', 256, 128, 2, False, lora_r=64), m.Run('qwen2 1024x6', 256, 128, 3, True)]\n"
        "found = [m.check(run) for run in runs]\n"
        "print(json.dumps([[f['predicted'], f['measured']['training']] for f in found]))"
    )
    environment = os.environ | GIVES_BACK | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for predicted, measured in json.loads(done.stdout.splitlines()[-1]):
        assert measured > 200, "too small to tell"
        assert predicted == pytest.approx(measured, rel=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    save_backbone(folder, "llama", small_tokenizer())
    return folder


@pytest.mark.slow
class TestCommand:
    @pytest.mark.slow
    def test_json(self, folder: Path, capsys) -> None:
        assert (
            main(["plan", str(folder / "config.json"), "--json", "--card", "24", "--cards", "2", "--max_length", "256"])
            == 0
        )
        told = json.loads(capsys.readouterr().out)
        card = told["cards"][0]
        assert {setting["engine"] for setting in card["settings"]} == {"ddp", "zero2", "zero3", "zero3_offload"}
        for setting in card["settings"]:
            assert setting["total"] == sum(setting[name] for name in Memory.__dataclass_fields__)
        assert card["fastest"]["engine"] == "ddp"
        assert "--max_length 256" in card["line"] and "accelerate_configs/ddp.yaml" in card["line"]

    @pytest.mark.slow
    def test_weights_are_not_read(self, folder: Path, tmp_path, capsys) -> None:
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        assert main(["plan", str(tmp_path), "--card", "cpu:8", "--engine", "single"]) == 0
        assert "the fastest that fits: single" in capsys.readouterr().out

    @pytest.mark.slow
    def test_an_optimizer_step_is_the_one_that_was_asked_for(self, folder: Path, capsys) -> None:
        assert main(["plan", str(folder), "--json", "--card", "24", "--cards", "8", "--pairs_per_step", "48"]) == 0
        fastest = json.loads(capsys.readouterr().out)["cards"][0]["fastest"]
        assert fastest["ranks"] * fastest["pairs"] * fastest["accumulation"] == 48

    @pytest.mark.slow
    def test_processes_on_a_cpu_are_on_one_host(self, folder: Path, capsys) -> None:
        assert main(["plan", str(folder), "--json", "--card", "cpu:8", "--cards", "16", "--max_length", "256"]) == 0
        line = json.loads(capsys.readouterr().out)["cards"][0]["line"]
        assert "--num_processes 16" in line and "--num_machines" not in line

    @pytest.mark.slow
    def test_data_is_measured(self, folder: Path, tmp_path, capsys) -> None:
        rows = [{"prompt": "What is it? " * n, "chosen": "Paris.", "rejected": "No."} for n in range(1, 30)]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["plan", str(folder), "--json", "--card", "24", "--dataset", str(path), "--lora_r", "4"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert 100 < told["longest"] < 1024
        assert f"--dataset {path}" in told["cards"][0]["line"] and "--lora_r 4" in told["cards"][0]["line"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "one of the two"),
            (["x/y/z", "--params", "7B"], "one of the two"),
            (["--params", "9B"], "there are 7B"),
            (["--params", "7B", "--card", "24", "cpu:8"], "not for both at once"),
            (["--params", "7B", "--dataset", "x.jsonl"], "give the MODEL"),
            (["--params", "7B", "--share", "1"], "--share"),
            (["--params", "7B", "--engine", "zero3"], "--cards N"),
            (
                ["--params", "7B", "--engine", "zero3", "--cards", "8", "--quantization", "8bit"],
                "use --quantization 4bit",
            ),
            (["--params", "7B", "--cards", "16", "--quantization", "8bit"], "use --quantization 4bit"),
            (["--params", "7B", "--engine", "ddp", "--cards", "16"], "use --engine zero3"),
            (["--params", "7B", "--cards", "6"], "Give a multiple of 6, as 60 or 66"),
            (["--params", "7B", "--cards", "6", "--pairs_per_step", "4"], "Give a multiple of 6, as 6."),
            (
                ["--params", "7B", "--engine", "zero3_offload", "--cards", "2", "--card", "cpu:64"],
                "use --engine zero3.",
            ),
            (["--params", "7B", "--cards", "12"], "give 8 or 16"),
            (["no/such/folder"], "There is no folder"),
            (["--params", "7B", "--lora_target_modules", "q_proj", "v_porj"], "Did you mean v_proj?"),
            (["--params", "7B", "--lora_target_modules", "all-linear", "q_proj"], "all-linear takes all linear layers"),
            (["--params", "7B", "--lora_layers", "99"], "has layers 0 to 31"),
            (
                ["--params", "7B", "--columns", "prompt=question"],
                "--columns ['prompt=question'] has no effect: there is no",
            ),
            (["--params", "7B", "--model_revision", "main"], "--model_revision main has no effect"),
        ],
    )
    def test_mistakes(self, words: list[str], message: str, capsys) -> None:
        assert main(["plan", *words]) == 2
        assert message in capsys.readouterr().err
