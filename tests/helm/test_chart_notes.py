"""What people read after an installation."""

from __future__ import annotations

from collections.abc import Callable

from rendering import Rendered
from variants import VARIANTS

Chart = Callable[..., Rendered]


def test_they_say_what_to_do_next(chart: Chart) -> None:
    """How to wait, how to ask each model, where the page is, and what is still open."""
    notes = chart(**VARIANTS["several models"]).notes
    assert "get rayservice guard" in notes
    for model in ("resnet18", "digits"):
        assert f"/v1/models/{model}:predict" in notes
    assert "/guard/" in notes
    assert "set apiKeys" in notes
    assert "monitoring.podMonitor.enabled" in notes


def test_they_do_not_warn_of_what_is_done(chart: Chart) -> None:
    """With keys and monitoring there is nothing to say of them, and the example bears a key."""
    notes = chart(**VARIANTS["keys"]).notes
    assert "set apiKeys" not in notes
    assert "Authorization: Bearer" in notes
    assert "monitoring.podMonitor.enabled" not in chart(**VARIANTS["monitoring"]).notes
