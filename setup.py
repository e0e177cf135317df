"""What pyproject.toml cannot say: the compiled part is optional, and the shipped files go into the package."""

import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

SHIPPED = ("recipes", "accelerate_configs", "ds_configs")
"""Folders of the repository that `qlora_rm/shipped.py` finds here in a checkout, and in `qlora_rm/files/` once installed."""

# Without a C compiler the package installs all the same: bitsandbytes then does the work of nf4.c, slowly.
NF4 = Extension(
    "qlora_rm.merging._nf4",
    ["qlora_rm/merging/nf4.c"],
    extra_compile_args=["-O3", "-ffp-contract=off"],
    optional=True,
)


class BuildWithShippedFiles(build_py):
    """Copies the shipped folders into the package that is built; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "qlora_rm", "files")
            shutil.rmtree(target, ignore_errors=True)
            for folder in SHIPPED:
                shutil.copytree(folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))


class WheelOfWhatWasBuilt(bdist_wheel):
    """A wheel without the compiled part fits every platform, and says so in its name."""

    def run(self) -> None:
        self.run_command("build")
        built = self.get_finalized_command("build_ext")
        if not Path(built.get_ext_fullpath(NF4.name)).exists():
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


setup(ext_modules=[NF4], cmdclass={"build_py": BuildWithShippedFiles, "bdist_wheel": WheelOfWhatWasBuilt})
