"""The package as its users get it: built, and installed into its own environment.

`python -m tests.installing` (make test-install) runs the complete demo, and `train` as a module, from a wheel that was
built without a C compiler. The folder's name has spaces and Chinese characters; HOME does not exist and cannot be
created. Libraries come from the running environment, since downloading them again would take longer than the test.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from sysconfig import get_path

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = (".ci", "accelerate_configs", "benchmarks", "docs", "ds_configs", "qlora_rm", "recipes", "tests")
NO_HOME = "/proc/no_home"
"""A folder that is read-only for everybody, including root."""


def build(folder: Path, *, compiler: bool = True) -> tuple[Path, Path]:
    """Build an sdist from a copy of this checkout in `folder`, and a wheel from the sdist; return both.

    Arguments:
        compiler: whether there is a C compiler.
    """
    source = folder / "source"
    copy_checkout(source)
    environment = os.environ if compiler else os.environ | {"CC": "/bin/false"}
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder], cwd=source, env=environment)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def copy_checkout(target: Path) -> None:
    """Copy the repository without its build products."""
    for name in BUILT_FROM:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, target)


def install(what: Path, folder: Path, *, editable: bool = False) -> Path:
    """Create an environment in `folder` with a wheel or an editable checkout, and the running environment's libraries.

    Returns: its interpreter.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    installed = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    # only the path: its .pth files, such as an editable install's, are not read
    (installed / "libraries.pth").write_text(get_path("purelib") + "\n", encoding="utf-8")
    how = ["--quiet", "--no-index", "--no-deps", "--ignore-installed", "--no-build-isolation"]
    run([sys.executable, "-m", "pip", "--python", python, "install", *how, *(["-e"] if editable else []), what])
    return python


def run(command: list[str | Path], **settings: object) -> str:
    """Return a command's standard output; if it fails, raise with both streams."""
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, **settings)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def environment_of(python: Path, **more: str) -> dict[str, str]:
    """Return the variables of a user who has activated that environment, without this checkout."""
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return ours | {"PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]), **more}


def walk(folder: Path) -> None:
    """Run what a user types after `pip install`; print each command with its time, and stop at an error."""
    wheel, _ = build(folder / "dist", compiler=False)
    assert wheel.name.endswith("-py3-none-any.whl"), wheel.name
    python = install(wheel, folder / "environment")
    here = folder / "a folder 文件夹"
    (here / "qlora_rm").mkdir(parents=True)
    (here / "qlora_rm" / "__init__.py").write_text("raise ImportError('not this one')\n", encoding="utf-8")
    environment = environment_of(python, HOME=NO_HOME)
    short = ["--config", "recipes/demo.yaml", "--max_steps", "8", "--output_dir"]
    for command in (
        ["qlora-rm", "demo"],
        ["accelerate", "launch", "--quiet", "-m", "qlora_rm.train", *short, "runs/launched"],
        ["python", "-m", "qlora_rm.train", *short, "runs/as_module"],
        ["python", "-P", "-m", "qlora_rm", "verify", "runs/as_module"],
    ):
        if command[1] != "demo":  # only the demo ignores files in the working directory; Python's -m does not
            shutil.rmtree(here / "qlora_rm", ignore_errors=True)
        began = time.monotonic()
        print(f"\n$ {' '.join(command)}", flush=True)
        subprocess.run(command, cwd=here, env=environment, check=True, timeout=600)
        print(f"[{time.monotonic() - began:.0f} s]", flush=True)
    left = {path.name for path in here.iterdir()}
    assert left == {"runs"}, left


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="qlora_rm 安装 ") as scratch:
        walk(Path(scratch))
