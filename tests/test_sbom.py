"""The bill of materials: what `make sbom` and the image's recipe say is in an environment."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOL = ROOT / ".venv-sbom" / "bin" / "cyclonedx-py"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_it_names_what_is_installed(tmp_path: Path) -> None:
    """In CycloneDX, with the versions that run here, by the tool as `make sbom` installs it."""
    made = run("make", f"PYTHON={sys.executable}", ".venv-sbom/installed")
    if "No matching distribution found" in made.stderr:
        pytest.skip("cyclonedx-bom is not to be had: no registry")
    assert made.returncode == 0, made.stderr
    path = tmp_path / "sbom.cdx.json"
    asked = ("environment", "--pyproject", "pyproject.toml", "--output-file", path, sys.executable)
    written = run(TOOL, *asked, "--no-validate")  # against CycloneDX' schema, which takes most of its time
    assert written.returncode == 0, written.stderr
    document = json.loads(path.read_text())
    assert document["bomFormat"] == "CycloneDX"
    assert re.fullmatch(r"1\.\d+", document["specVersion"])
    assert document["metadata"]["component"]["name"] == "backdoor-guard"
    found = {one["name"]: one["version"] for one in document["components"]}
    for package in ("torch", "torchvision", "ray", "numpy"):
        assert found[package] == version(package)
    assert "cyclonedx-bom" not in found


def test_image_and_makefile_ask_alike() -> None:
    """The same command for both environments; the image's stage is not its last, so that a build makes the image."""
    recipe, makefile = (ROOT / "Dockerfile").read_text(), (ROOT / "Makefile").read_text()
    asked = [re.findall(r"bin/cyclonedx-py (environment .*)--output-file", text) for text in (recipe, makefile)]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 1
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", recipe, re.M)
    assert ("scratch", "sbom") in stages
    assert stages[-1] == ("${BASE}", "")
    assert "--from=inventory" not in recipe[recipe.rindex("FROM ${BASE}") :]
