"""API keys that the chart keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rendering import Rendered
from variants import VARIANTS

from deployments.keys import Keys, KeySettings


def test_the_file_is_one_that_the_guard_reads(chart: Callable[..., Rendered], tmp_path: Path) -> None:
    """Its keys open what their roles may."""
    (secret,) = chart(**VARIANTS["keys"]).objects_of("Secret")
    path = tmp_path / "keys"
    path.write_text(secret["stringData"]["keys"])
    path.chmod(0o600)
    keys = Keys.from_settings(KeySettings(file=path, environment=False))
    keys.require("inference", "Bearer one-key-of-16-signs", None)
    keys.require("administration", "Bearer two-key-of-16-signs", None)


def test_no_secret_without_keys_or_with_ones_own(chart: Callable[..., Rendered]) -> None:
    """The chart makes what it is given, nothing else."""
    assert not chart().objects_of("Secret")
    assert not chart(**VARIANTS["keys of one's own"]).objects_of("Secret")
