"""What the watch over all replicas must know of a served artifact, beside the counters: a small JSON file a model.

Each replica writes its own where its counters lie, whenever an artifact or a threshold takes effect.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from deployments.settings import Settings
from guard.null import law_from_json

FOLDER = "models"
NODES = "nodes"  # of copies of other nodes' folders: see `deployments.watch.nodes`
SHAPES = ("score", "brightness", "contrast")
log = logging.getLogger(__name__)


class Shape(Settings):
    """How a quantity lies on the clean set. shares: of clean images in each bin that ends at a bound, and above the
    last; they sum to 1. images: how many there were."""

    bounds: tuple[float, ...]
    shares: tuple[float, ...]
    images: int


class Facts(Settings):
    """Of one served model.

    labels: values of ``predicted_class``. nominal: label → share of its clean images that are flagged, where they ever
    are. support: the smallest p-value that the clean set supports; None where there are none. score_limit: the score
    above which an image is flagged. score, brightness, contrast: None where the artifact does not say.
    """

    model: str
    version: str
    method: str
    fingerprint: str
    calibrated_at: str
    labels: tuple[str, ...]
    nominal: dict[str, float]
    threshold: float | None = None
    support: float | None = None
    score_limit: float | None = None
    score: Shape | None = None
    brightness: Shape | None = None
    contrast: Shape | None = None
    began: int = Field(default_factory=lambda: began(os.getpid()), description="When the process that says so began.")
    quarantine: str | None = Field(default=None, description="The folder where flagged images are kept.")

    def write(self, folder: Path) -> None:
        """Into ``folder``/models, as this process's, whole or not at all."""
        place = folder / FOLDER
        place.mkdir(mode=0o700, exist_ok=True)
        draft = place / f".{self.model}.{os.getpid()}"
        draft.write_text(self.model_dump_json())
        draft.replace(place / f"{self.model}.{os.getpid()}.json")


def read_facts(folder: Path) -> dict[str, Facts | None]:
    """model → what the processes that live say, of this node and of others whose folders are copied here; None where
    they do not agree, as while a change is under way.

    Shapes on which they do not agree, since one began with another artifact and has its bins, are left out. What dead
    processes said is removed; a file that cannot be read, of another release perhaps, is left out.
    """
    here = living_facts(folder)
    elsewhere = {path: _read(path) for path in folder.glob(f"{NODES}/*/{FOLDER}/*.json")}
    found: dict[str, list[Facts]] = {}
    for path, said in sorted((here | elsewhere).items()):
        if said is not None:
            found.setdefault(path.stem.rpartition(".")[0], []).append(said.model_copy(update={"began": 0}))
    return {model: _agreed(said) for model, said in found.items()}


def living_facts(folder: Path) -> dict[Path, Facts | None]:
    """file → what processes of this node that live say; None where it cannot be read. What those said that are dead, or
    whose number another has now, is removed."""
    found: dict[Path, Facts | None] = {}
    for path in (folder / FOLDER).glob("*.json"):
        process = path.stem.rpartition(".")[2]
        if process.isdigit() and running(int(process)):
            said = _read(path)
            if said is None or said.began == began(int(process)):
                found[path] = said
                continue
        path.unlink(missing_ok=True)
    return found


def _read(path: Path) -> Facts | None:
    try:
        return Facts.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s is not read: %s", path.name, error)
        return None


def _agreed(said: Sequence[Facts]) -> Facts | None:
    first = said[0]
    shapes = {name: getattr(first, name) for name in SHAPES}
    shapes = {name: one if all(getattr(other, name) == one for other in said) else None for name, one in shapes.items()}
    agreed = {one.model_copy(update=shapes).model_dump_json() for one in said}
    return first.model_copy(update=shapes) if len(agreed) == 1 else None


def began(process: int) -> int:
    """When a process began, in ticks since the machine did; 0 where nobody tells."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def running(process: int) -> bool:
    """Whether a process of this number lives on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def facts_of(
    manifest: Mapping[str, Any],
    *,
    model: str,
    version: str,
    threshold: float | None,
    labels: Sequence[str],
    bounds: Mapping[str, Sequence[float]],
) -> Facts:
    """Of the artifact with this manifest. threshold: the p-value in force. labels: of ``predicted_class``. bounds: the
    buckets of score, brightness and contrast."""
    fit = manifest.get("fit", {})
    images, inputs = int(fit.get("images", 0)), fit.get("inputs", {})
    return Facts(
        model=model,
        version=version,
        method=manifest["method"],
        fingerprint=manifest["fingerprint"],
        calibrated_at=manifest["created_at"],
        labels=tuple(labels),
        nominal=nominal_ratios(manifest, labels, threshold),
        threshold=threshold,
        support=None if threshold is None else manifest["threshold"]["p_value_support"],
        score_limit=0.0 if threshold is None else law_from_json(manifest["null"]).threshold(threshold),
        score=shape(bounds["score"], fit.get("scores"), images),
        brightness=shape(bounds["brightness"], inputs.get("brightness"), images),
        contrast=shape(bounds["contrast"], inputs.get("contrast"), images),
    )


def shape(bounds: Sequence[float], clean: Sequence[float] | None, images: int) -> Shape | None:
    """``clean``: a sample, or evenly spaced quantiles, of the quantity on the clean set; None where unknown."""
    if not clean or images < 1:
        return None
    values = np.sort(np.asarray(clean, dtype=np.float64))
    below = np.searchsorted(values, bounds, side="right") / len(values)
    shares = np.diff(np.concatenate([[0.0], below, [1.0]]))
    return Shape(bounds=tuple(bounds), shares=tuple(shares.tolist()), images=images)


def nominal_ratios(manifest: Mapping[str, Any], labels: Sequence[str], threshold: float | None) -> dict[str, float]:
    """Label → share of its clean images that are flagged: the threshold for each class where there are p-values, else
    what the fit measured for the corrected classes, with the doubt of few images; none where it does not say."""
    if threshold is not None:
        return dict.fromkeys(labels, threshold)
    fit = manifest.get("fit", {})
    ratios = {}
    for target, facts in fit.get("targets", {}).items():
        if "fpr_target" in facts and "images_per_class" in fit:
            images = int(fit["images_per_class"][int(target)])
            ratios[str(manifest["classes"][int(target)])] = (facts["fpr_target"] * images + 1) / (images + 2)
    return ratios
