"""transformers 4.57 reads the files that 5 wrote: rotary parameters, tokenizers, scores."""

import json

import pytest

from qlora_rm.artifacts.golden import SAME, drift
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.exporting import write
from qlora_rm.exporting.consumer import IN_V4
from tests.consumers.conftest import BACKBONES, make_toy
from tests.consumers.overlays import HERE, overlay, run_in
from tests.reward_models_for_tests import copy_of


@pytest.mark.long
@pytest.mark.slow
def test_golden_ids_and_scores_come_out_of_transformers_4(toy, tmp_path, monkeypatch):
    """Holds for every architecture, and for one with a separate folder for transformers 4.

    Without the keys for transformers 4, scores silently differ.
    """
    folders = [toy(backbone) for backbone in BACKBONES]
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in folders]
    assert {config["architectures"][0] for config in configs} == IN_V4, "the allow-list names what is read here"
    assert not [folder for folder in folders if (folder / "v4").exists()]

    monkeypatch.setattr(write, "reads_the_same", lambda *_: False)
    apart = make_toy(tmp_path / "apart", "llama_far") / "v4"
    bare = copy_of(toy("llama_far"), tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text(encoding="utf-8"))
    without = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    (bare / "config.json").write_text(json.dumps(without), encoding="utf-8")

    words = [str(folder) for folder in (*folders, apart, bare)]
    read = json.loads(run_in(overlay("transformers-4"), HERE / "in_transformers_4.py", *words).splitlines()[-1])
    for folder in (*folders, apart):
        manifest, found = Manifest.load(folder), read[str(folder)]
        assert found["missing"] == []
        assert found["pad"] == manifest.contract.pad_token_id
        assert found["ids"] == [item.token_ids for item in manifest.golden], folder
        assert drift(manifest.golden, found["scores"], SAME).ok, folder
    assert not drift(Manifest.load(bare).golden, read[str(bare)]["scores"], SAME).ok
