"""What the quarantine holds, for the metrics and for the page."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from deployments.events.shelf import Entry, held, read

SHOWN = 24
THUMBNAIL = 96  # pixels


def size(folder: Path) -> tuple[int, int]:
    """(images, bytes)."""
    there = held(folder)
    return len(there), sum(one.bytes for one in there)


def recent(folder: Path, model: str) -> list[dict[str, Any]]:
    """The newest images of a model, newest first: time (ISO 8601), model, class, score, thumbnail (a data URI)."""
    found: list[dict[str, Any]] = []
    for one in reversed(held(folder)):
        entry = read(folder, one)
        picture = None if entry is None or entry.model != model else _thumbnail(folder, entry)
        if entry is not None and picture is not None:
            what = {"time": entry.time.isoformat(), "model": model, "class": entry.predicted_class}
            found.append({**what, "score": entry.score, "thumbnail": picture})
        if len(found) == SHOWN:
            break
    return found


def _thumbnail(folder: Path, entry: Entry) -> str | None:
    try:
        return _read(folder / entry.file)
    except OSError:  # removed meanwhile
        return None


@lru_cache(maxsize=256)
def _read(path: Path) -> str:
    """The file never changes: its name is never taken twice."""
    with Image.open(path, formats=["PNG"]) as picture:
        small = picture.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        small.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
