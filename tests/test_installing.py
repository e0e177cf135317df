"""The content of wheel and sdist, and running the package from an installed wheel."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from qlora_rm import shipped
from tests.installing import ROOT, build, copy_checkout, environment_of, install, run

PACKAGE = ROOT / "qlora_rm"


def files_below(folder: Path) -> set[str]:
    found = {str(path.relative_to(ROOT)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.endswith((".pyc", ".so"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a folder 文件夹")


@pytest.fixture(scope="module")
def built(folder: Path) -> tuple[Path, Path]:
    return build(folder / "dist", compiler=False)


@pytest.fixture(scope="module")
def python(built: tuple[Path, Path], folder: Path) -> Path:
    return install(built[0], folder / "environment")


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_what_ships_with_it(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        wanted = {name: ROOT / name for name in files_below(PACKAGE) if not name.endswith(".c")}
        for name in shipped.FOLDERS:
            wanted |= {f"qlora_rm/files/{path}": ROOT / path for path in files_below(ROOT / name)}
        assert inside == set(wanted)
        assert all(wheel.read(name) == path.read_bytes() for name, path in wanted.items())
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    assert built[0].name.endswith("-py3-none-any.whl"), "without a compiler nothing in it is for one platform"


@pytest.mark.slow
def test_the_sdist_holds_the_repository(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = {"LICENSE", "README.md", "Makefile", "constraints.txt", "pyproject.toml", "setup.py", ".ci/run"}
    for name in ("qlora_rm", "tests", "docs", "benchmarks", *shipped.FOLDERS):
        tracked |= files_below(ROOT / name)
    assert not tracked - inside


@pytest.mark.slow
@pytest.mark.skipif(os.system("command -v cc >/dev/null") != 0, reason="there is no C compiler")
def test_a_wheel_with_the_compiled_part_is_for_one_platform(tmp_path: Path) -> None:
    wheel, _ = build(tmp_path)
    with zipfile.ZipFile(wheel) as content:
        compiled = [name for name in content.namelist() if name.endswith(".so")]
    assert len(compiled) == 1 and compiled[0].startswith("qlora_rm/merging/_nf4.")
    assert not wheel.name.endswith("-any.whl")


@pytest.mark.slow
class TestInstalled:
    @pytest.mark.slow
    def test_it_is_the_installed_one_that_runs(self, python: Path, tmp_path: Path) -> None:
        (tmp_path / "qlora_rm").mkdir()  # as in the folder that a checkout was cloned into
        environment = environment_of(python)
        said = run([python, "-m", "qlora_rm", "recipes"], cwd=tmp_path, env=environment).splitlines()
        assert {Path(line).name for line in said} >= {"demo.yaml", "single_gpu.yaml", "zero3.json"}
        assert all(Path(line).is_relative_to(python.parents[1]) for line in said)
        for door in (["qlora-rm", "train"], [python, "-m", "qlora_rm.train"], [python, "-P", "-m", "qlora_rm.train"]):
            assert run([*door, "--help"], cwd=tmp_path, env=environment).startswith("usage: qlora-rm train")

    def test_launched_by_its_path_it_comes_after_the_standard_library(self, python: Path, tmp_path: Path) -> None:
        train = next(python.parents[1].rglob("qlora_rm/train.py"))
        code = f"import runpy, sys; before = sys.path[:]; runpy.run_path({str(train)!r}); print(sys.path == before)"
        assert run([python, "-P", "-c", code], cwd=tmp_path, env=environment_of(python)) == "True\n"

    def test_its_recipes_are_read_from_any_folder(self, python: Path, tmp_path: Path) -> None:
        """The distilbert recipe names a chat template by a path."""
        code = (
            "from qlora_rm.shipped import as_typed, here_or_shipped\n"
            "print(as_typed('recipes/demo.yaml'), here_or_shipped('recipes/templates/human_assistant.jinja'), sep='\\n')"
        )
        said = run([python, "-c", code], cwd=tmp_path, env=environment_of(python))
        files = next(python.parents[1].rglob("qlora_rm/files"))
        assert said.splitlines() == [
            str(files / "recipes/demo.yaml"),
            str(files / "recipes/templates/human_assistant.jinja"),
        ]

    @pytest.mark.slow
    def test_an_editable_install_is_not_hidden_by_a_folder_of_its_name(self, tmp_path: Path) -> None:
        """For example the checkout itself, seen from its parent folder."""
        checkout = tmp_path / "checkout"
        copy_checkout(checkout)
        python = install(checkout, tmp_path / "environment", editable=True)
        (tmp_path / "qlora_rm").mkdir()
        said = run([python, "-m", "qlora_rm", "recipes"], cwd=tmp_path, env=environment_of(python))
        assert str(checkout / "recipes" / "demo.yaml") in said.splitlines()


def test_python_minus_p_keeps_the_path_it_was_given(tmp_path: Path) -> None:
    """Under -P the script's folder is not on sys.path, so `train.py` must not remove an entry."""
    code = f"import runpy, sys; before = sys.path[:]; runpy.run_path({str(PACKAGE / 'train.py')!r}); print(sys.path[1:] == before)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, encoding="utf-8")
    assert done.stdout == "True\n", done.stderr
