"""Choosing the better base on the user's own pairs."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.cli import main
from qlora_rm.merging.compare_bases import sign_test
from qlora_rm.verification.folder import verify
from tests.reward_models_for_tests import llama_adapter


def rows(path: Path, flipped: bool) -> str:
    """Return pairs on which the toy model's two merges disagree, in either direction."""
    sides = ("rejected", "chosen") if flipped else ("chosen", "rejected")
    pairs = [{"prompt": f"What {i}? ", sides[0]: "Paris." * (i % 3 + 1), sides[1]: f"No {i}."} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("flipped", [False, True])
def test_keeps_the_one_that_agrees_more(tmp_path: Path, capsys: Any, flipped: bool) -> None:
    output, data = tmp_path / "merged", rows(tmp_path / "rows.jsonl", flipped)
    words = ["merge", str(llama_adapter()), "--output", str(output), "--dtype", "fp32", "--base", "both", "--json"]
    assert main([*words, "--dataset", data]) == 0
    choice = json.loads(capsys.readouterr().out)
    accuracy = {base: m["agreement"]["accuracy"] for base, m in choice["measured"].items()}
    assert accuracy["dequantized"] != accuracy["original"], "the toy's pairs must tell them apart"
    assert choice["kept"] == max(accuracy, key=lambda base: accuracy[base])
    assert choice["measured"]["dequantized"]["drift"] < 1e-4 and choice["measured"]["dequantized"]["flips"] == 0
    assert choice["measured"]["original"]["flips"] > 0
    assert accuracy["dequantized"] == choice["adapter"]["accuracy"]
    manifest = Manifest.load(output)
    assert manifest.merge is not None and manifest.merge.base == choice["kept"]
    assert manifest.history[-1].settings["chosen"] == choice["reason"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "rows.jsonl"]
    assert [check for check in verify(str(output)) if not check.ok] == []


def test_needs_pairs(tmp_path: Path, capsys: Any) -> None:
    words = ["merge", str(llama_adapter()), "--output", str(tmp_path / "out")]
    assert main([*words, "--base", "both"]) == 2
    assert "--dataset" in capsys.readouterr().err
    assert main([*words, "--dataset", "x.jsonl"]) == 2
    assert "--base both" in capsys.readouterr().err


@given(st.integers(0, 40), st.integers(0, 40))
def test_sign_test_is_a_probability_that_knows_no_side(a: int, b: int) -> None:
    assert 0 < sign_test(a, b) <= 1
    assert sign_test(a, b) == sign_test(b, a)
    assert sign_test(a + 1, a) == 1
    assert sign_test(8, 0) == pytest.approx(2 / 2**8)
