"""A plan respects the number of positions that a backbone has, as training does."""

from pathlib import Path

import pytest

from qlora_rm.config import AdapterConfig, BackboneConfig, DataConfig, PlanConfig
from qlora_rm.errors import UserError
from qlora_rm.planning.report import Plan, make_plan
from tests.models_for_tests import save_backbone
from tests.tokenizers_for_tests import small_tokenizer


def plan_of(folder: str, **options: int) -> Plan:
    asked = PlanConfig(card=["cpu:8"], engine="single", pairs_per_step=2, **options)  # type: ignore[arg-type]
    return make_plan(folder, asked, BackboneConfig(quantization="none"), AdapterConfig(), DataConfig())


@pytest.mark.slow
def test_the_default_length_is_lowered_and_another_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_backbone(tmp_path, "bert", small_tokenizer())
    planned = plan_of(folder)
    assert "max_length: 512, since" in capfd.readouterr().err
    assert any("--max_length 512" in line for line in planned.lines())
    with pytest.raises(UserError, match=r"--max_length 600 is more than the 512 positions.*--max_length 512"):
        plan_of(folder, max_length=600)
