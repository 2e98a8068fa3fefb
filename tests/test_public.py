"""The one door, and which way imports run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import guard

ROOT = Path(__file__).parents[1]


def test_all_is_sorted_and_complete() -> None:
    """`guard.__all__` is sorted, and the door opens to each of its names, in whatever order modules are imported."""
    assert guard.__all__ == sorted(guard.__all__)
    assert set(guard.__all__) <= set(dir(guard))
    modules = {path.stem for path in (ROOT / "guard").glob("*.py")} | {"cli", "methods"}
    assert modules & set(guard.__all__) == {"errors"}  # else the module would hide what bears its name
    for name in guard.__all__:
        assert isinstance(getattr(guard, name), ModuleType) == (name == "errors")
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        getattr(guard, "nothing_of_the_kind")  # noqa: B009


def test_what_needs_no_torch_does_not_wait_for_it() -> None:
    """The command line's help and a server that reads its settings start without torch or scipy.stats."""
    code = (
        "import sys, guard.cli, deployments.app; print(sorted({'torch', 'scipy.stats', 'matplotlib'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_library_imports_no_serving_engine() -> None:
    """`import guard` and its command line bring in neither Ray nor the packages above it."""
    names = "guard, guard.cli, guard.fitting, guard.evaluation, guard.artifact, guard.plots"
    code = f"import sys, {names}; print(sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"ray", "deployments", "benchmarks"} & set(ast.literal_eval(done.stdout))


def imports(package: str) -> set[tuple[str, str]]:
    """(file, first part of what it imports) over every import statement of a package, at any depth."""
    found: set[tuple[str, str]] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {(path.name, alias.name.split(".")[0]) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                found.add((path.name, str(node.module).split(".")[0]))
    return found


@pytest.mark.parametrize(
    ("package", "above"), [("guard", {"deployments", "benchmarks", "ray"}), ("deployments", {"benchmarks"})]
)
def test_nothing_looks_back_up(package: str, above: set[str]) -> None:
    """No import statement of a package names a package above it."""
    found = imports(package)
    assert ("__init__.py", "guard") in found or package != "guard"  # the walk saw something
    assert not {(file, name) for file, name in found if name in above}
