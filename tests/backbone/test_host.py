"""The memory of a container or a job is what its control groups leave, not what the host has."""

from pathlib import Path

import psutil

from qlora_rm.backbone.host import _rooms, free_memory


def test_the_narrowest_limit_counts(tmp_path: Path) -> None:
    for folder, limit, used in (("job", "5000", "1000"), ("job/step", "max", "700"), ("job/step/task", "900", "1200")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.current").write_text(f"{used}\n")
    membership = tmp_path / "cgroup"
    membership.write_text("1:cpu:/elsewhere\n0::/job/step/task\n")
    assert list(_rooms(tmp_path, membership)) == [0, 4000]
    membership.write_text("0::/job/step\n")
    assert list(_rooms(tmp_path, membership)) == [4000]


def test_no_groups_no_limit(tmp_path: Path) -> None:
    assert list(_rooms(tmp_path, tmp_path / "missing")) == []
    assert 0 <= free_memory() <= psutil.virtual_memory().total
