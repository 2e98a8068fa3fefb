"""The image: what a linter says of its recipe, and that it is built from what the project has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_recipe_lints_clean() -> None:
    """hadolint has nothing against it."""
    found = subprocess.run(
        [Path(sys.executable).parent / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_what_it_copies_is_there_and_not_ignored() -> None:
    """Every path copied from the project exists, and .dockerignore, which leaves out all else, lets it through."""
    recipe = (ROOT / "Dockerfile").read_text()
    copied = [path for line in re.findall(r"^COPY (?!--from)(.+) \S+$", recipe, re.M) for path in line.split()]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {"guard", "deployments", "pyproject.toml"} <= set(copied)
    assert set(copied) == set(allowed)
    for path in copied:
        assert (ROOT / path).exists()


def test_image_and_chart_have_the_same_ray() -> None:
    """The version in the recipe is the one that KubeRay is told."""
    (version,) = re.findall(r"^ARG RAY_VERSION=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert f'rayVersion: "{version}"\n' in (ROOT / "helm" / "guard" / "values.yaml").read_text()


def test_it_runs_as_nobody_in_particular() -> None:
    """The last user is a number that is not root's, as Kubernetes wants it, and the same as the chart's."""
    user = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.M)[-1]
    chart = (ROOT / "helm" / "guard" / "values.yaml").read_text()
    assert f"runAsUser: {user[0]}\n" in chart
    assert f"runAsGroup: {user[1]}\n" in chart
    assert user[0] != "0"
