"""A module imports only from packages below its own, so that no two packages import each other; the lower ones load nothing heavy."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "qlora_rm"
GROUND = [
    "__init__",
    "bearer",
    "config",
    "console",
    "errors",
    "intervals",
    "launchers",
    "libraries",
    "options",
    "output",
    "progress",
    "shipped",
    "streams",
    "surroundings",
]
FLOORS = {
    **dict.fromkeys(GROUND, 0),
    "preferences": 1,
    "backbone": 2,
    "planning": 3,
    "artifacts": 4,
    **dict.fromkeys(["training", "verification", "evaluation"], 5),
    **dict.fromkeys(["merging", "exporting", "serving", "demo"], 6),
    **dict.fromkeys(["cli", "commands", "train", "__main__"], 7),
}
SHARED_FLOORS = (0, 7)  # modules of the lowest level, and commands, may import one another
LIGHT = {*GROUND, "preferences", "cli", "commands"}  # packages that `qlora-rm --help` may load
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "matplotlib",
    "pandas",
    "peft",
    "starlette",
    "torch",
    "transformers",
    "trl",
    "uvicorn",
}

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    module: str
    """Dotted and absolute: `qlora_rm.config`, `torch.nn`."""
    names: tuple[str, ...]
    late: bool
    """Whether the import is inside a function, or only for the type checker."""


def package_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imports_of(module: Path) -> list[Import]:
    """Return every import of a module, with relative ones made absolute."""

    def visit(node: ast.AST, late: bool) -> list[Import]:
        if isinstance(node, ast.Import):
            return [Import(alias.name, (), late) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            parents = ("qlora_rm", *module.parent.parts)
            base = ".".join(parents[: len(parents) + 1 - node.level]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            names = tuple(alias.name for alias in node.names)
            if source == "qlora_rm":  # `from qlora_rm import config` names a package
                return [Import(f"qlora_rm.{name}", (), late) for name in names]
            return [Import(source, names, late)]
        late = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        late = late or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        return [found for child in ast.iter_child_nodes(node) for found in visit(child, late)]

    return visit(ast.parse((PACKAGE / module).read_text(encoding="utf-8")), False)


def package_named(imported: Import) -> str:
    """Return the package that one of our imports names; a plain `qlora_rm` or `qlora_rm.__version__` is `__init__`."""
    package = [*imported.module.split("."), "__init__"][1]
    return "__init__" if package.startswith("__") else package


def allowed(package: str, imported: Import) -> bool:
    other = package_named(imported)
    if package == other or FLOORS[other] < FLOORS[package]:
        return True
    return FLOORS[package] == FLOORS[other] and FLOORS[package] in SHARED_FLOORS


def test_every_package_has_a_floor() -> None:
    assert {package_of(module) for module in MODULES} <= set(FLOORS), "a new package: add its floor to FLOORS"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_downward(module: Path) -> None:
    package = package_of(module)
    ours = [found for found in imports_of(module) if found.module.split(".")[0] == "qlora_rm"]
    if package == "__init__":
        ours = [
            found for found in ours if not found.late
        ]  # the public names, which are imported when they are asked for
    upward = [found.module for found in ours if not allowed(package, found)]
    assert not upward, f"{module} on floor {FLOORS[package]} imports {upward}"
    late = [found.module for found in ours if found.late and package not in ("cli", "commands")]
    assert not late, f"{module} imports {late} inside a function: a circle to untie"


@pytest.mark.parametrize("module", [module for module in MODULES if package_of(module) in LIGHT], ids=str)
def test_help_loads_nothing_heavy(module: Path) -> None:
    at_once = [found for found in imports_of(module) if not found.late]
    heavy = {found.module for found in at_once if found.module.split(".")[0] in HEAVY}
    heavy |= {
        found.module for found in at_once if found.module.startswith("qlora_rm.") and package_named(found) not in LIGHT
    }
    assert not heavy, f"{module} imports {heavy} at module level; import it in the function that needs it"


def test_no_module_shadows_an_installed_one() -> None:
    """`accelerate launch qlora_rm/train.py` puts qlora_rm/ first on sys.path."""
    inside = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "__init__",
        "__pycache__",
    }
    installed = set(packages_distributions()) | set(sys.stdlib_module_names)
    assert not inside & installed
