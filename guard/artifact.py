"""The artifact: a folder with all that serving needs, whole or absent, and refused with a sentence.

::

    manifest.json        what it is, for whom, how good; sizes and SHA-256 of the other files
    program.pt2          the captured classifier (torch.export)
    tensors.safetensors  the corrections, "<corrected network>.<site>.<name>"

Loading runs no code from the folder: see `guard.programs`. The digests tell damage, not malice: whoever can write
to the folder can make them anew.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.export import ExportedProgram

from guard.capture import Captured, fingerprint, from_program
from guard.corrections import CORRECTIONS
from guard.detector import DTYPES, Guard
from guard.errors import ArtifactDamaged, ArtifactMismatch, BadArtifact, BadInput
from guard.folders import swap
from guard.methods import METHODS, Corrections
from guard.programs import load_program
from guard.rules import Rule
from guard.twin import build_twin
from guard.types import InputSpec

FORMAT = "backdoor-guard"
FORMAT_VERSION = 2
MANIFEST, PROGRAM, TENSORS = "manifest.json", "program.pt2", "tensors.safetensors"


@dataclass(frozen=True)
class Artifact:
    """What a fit gives. networks: the corrections (site index → correction) of each corrected network, in the order of
    the rule. manifest: JSON-able, without the files' digests."""

    captured: Captured
    networks: tuple[Corrections, ...]
    rule: Rule
    manifest: dict[str, Any]

    def guard(self, device: str | torch.device | None = None) -> Guard:
        """The guard, ready to be called; ``device`` None: where the classifier was captured."""
        twin = build_twin(self.captured, *self.networks)
        dtype = self.manifest["settings"]["dtype"]
        return Guard(twin, self.rule, self.manifest, dtype=dtype, device=device or self.captured.device)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the folder beside its place and rename it.

        Raises:
            BadArtifact: the place is taken, and is no artifact or ``overwrite`` is off.
        """
        target = Path(path)
        taken = target.exists()
        if taken and not overwrite:
            raise BadArtifact(f"out: {target} exists; choose another folder, or allow overwriting it.", field="out")
        if taken and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
            raise BadArtifact(f"out: {target} exists and is no artifact; it is left alone.", field="out")
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            torch.export.save(_on_cpu(self.captured), draft / PROGRAM)
            tensors = {
                f"{network}.{index}.{name}": tensor.cpu().contiguous()
                for network, corrections in enumerate(self.networks)
                for index, correction in corrections.items()
                for name, tensor in correction.tensors().items()
            }
            save_file(tensors, draft / TENSORS)
            (draft / TENSORS).chmod(0o644)  # as the others: who serves need not be who fitted
            manifest = {
                **self.manifest,
                "corrections": [
                    {str(index): correction.kind for index, correction in corrections.items()}
                    for corrections in self.networks
                ],
                "files": {name: _digest(draft / name) for name in (PROGRAM, TENSORS)},
            }
            manifest["sha256"] = _seal(manifest)
            (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            draft.chmod(0o755)
            swap(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return target


def _on_cpu(captured: Captured) -> ExportedProgram:
    """The program as a machine without this one's GPU can read it."""
    if captured.device.type == "cpu":
        return captured.program
    from torch.export.passes import move_to_device_pass

    return move_to_device_pass(copy.deepcopy(captured.program), "cpu")  # the pass writes into what it gets


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> Guard:
    """Load an artifact as a guard.

    Args:
        path: the folder. model: if given, the artifact must have been made for just these weights.
        device: where to run.

    Raises:
        ArtifactDamaged: a file is missing, truncated or altered.
        ArtifactMismatch: another format version, or another model.
        BadArtifact: the folder is no artifact.
    """
    return load_artifact(path, model=model, device=device).guard(device)


def load_artifact(
    path: str | os.PathLike[str], *, model: nn.Module | None = None, device: str | torch.device = "cpu"
) -> Artifact:
    """`load`, as an artifact."""
    folder = Path(path)
    manifest = read_manifest(folder)
    for name in (PROGRAM, TENSORS):
        files = manifest["files"]
        expected = files.get(name) if isinstance(files, dict) else None
        if not (folder / name).is_file():
            raise ArtifactDamaged(f"artifact: {folder / name} is missing. Fit or copy the artifact again.")
        found = _digest(folder / name)
        if found != expected:
            raise ArtifactDamaged(
                f"artifact: {folder / name} is not what the manifest says ({found['bytes']} bytes, expected "
                f"{expected['bytes'] if expected else 'none'}; SHA-256 {found['sha256'][:12]}…). It was truncated or "
                "altered: fit or copy the artifact again."
            )
    if model is not None and fingerprint(model.state_dict()) != manifest["fingerprint"]:
        raise ArtifactMismatch(
            f"artifact: {folder} was made for another model (fingerprint {manifest['fingerprint'][:12]}…). "
            "Fit the guard again for this one."
        )
    try:
        program = load_program(folder / PROGRAM)
    except ValueError as error:
        raise ArtifactDamaged(f"artifact: {folder / PROGRAM} is not what a fit writes: {error}.") from error
    except Exception as error:
        raise ArtifactMismatch(
            f"artifact: this torch {torch.__version__} cannot read {folder / PROGRAM}, written with "
            f"{manifest.get('versions', {}).get('torch')}: {error}"
        ) from error
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, str(device))
    try:
        return _restored(folder, manifest, program)
    except BadArtifact:
        raise
    except (BadInput, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactDamaged(
            f"artifact: {folder} contradicts itself ({type(error).__name__}: {error}). Fit or copy the artifact again."
        ) from error


def _restored(folder: Path, manifest: dict[str, Any], program: ExportedProgram) -> Artifact:
    """The artifact from a program and a manifest that need not fit together; what does not fit raises."""
    spec = InputSpec.from_json(manifest["input"])
    captured = from_program(program, spec)
    image = next(node for node in reversed(program.graph.nodes) if node.op == "placeholder").meta["val"]
    if tuple(image.shape[1:]) != spec.shape:
        raise ValueError(f"the program takes {tuple(image.shape[1:])}, the manifest says {spec.shape}")
    if len(manifest["classes"]) != captured.classes:
        raise ValueError(f"{captured.classes} classes have {len(manifest['classes'])} names")
    if manifest["method"] not in METHODS:
        raise ArtifactMismatch(
            f"artifact: {folder} was fitted by the method {manifest['method']!r}; this guard knows "
            f"{', '.join(METHODS)}."
        )
    rule = METHODS[manifest["method"]].rule.from_manifest(manifest)
    if manifest["settings"]["dtype"] not in DTYPES:
        raise ValueError(f"the numeric type {manifest['settings']['dtype']!r} is unknown")
    datetime.fromisoformat(manifest["created_at"])
    if captured.fingerprint() != manifest["fingerprint"]:
        raise ArtifactMismatch(f"artifact: {folder / PROGRAM} holds other weights than the manifest names.")
    if len(manifest["corrections"]) != rule.networks:
        raise ValueError(f"{rule.networks} corrected networks have {len(manifest['corrections'])} lists of corrections")
    with safe_open(folder / TENSORS, framework="pt") as file:
        networks = tuple(
            _corrections(captured, kinds, file, str(network)) for network, kinds in enumerate(manifest["corrections"])
        )
    return Artifact(captured, networks, rule, manifest)


def _corrections(captured: Captured, kinds: dict[str, str], file: Any, network: str) -> Corrections:
    """The corrections of one corrected network from the tensors file."""
    corrections: Corrections = {}
    for index, kind in kinds.items():
        if kind not in CORRECTIONS:
            raise ArtifactMismatch(f"artifact: unknown correction {kind!r}; known are {', '.join(CORRECTIONS)}.")
        if not index.isdecimal():
            raise ValueError(f"there is no site {index!r}")
        site = captured.site(int(index))
        prefix = f"{network}.{index}."
        tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118 - not a dict
        for name, tensor in tensors.items():
            if tensor.shape != (site.channels,) or not tensor.is_floating_point() or not tensor.isfinite().all():
                raise ValueError(f"{prefix}{name} is not {site.channels} finite numbers")
        corrections[site.index] = CORRECTIONS[kind].from_tensors(tensors, site)
    if not corrections:
        raise ValueError(f"corrected network {network} has no correction")
    return corrections


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of an artifact of this format version.

    Raises:
        BadArtifact, ArtifactDamaged, ArtifactMismatch: see `load`.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise BadArtifact(f"artifact: {folder} has no {MANIFEST}; it is no artifact of `guard fit`.", field="artifact")
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ArtifactDamaged(f"artifact: {path} is no JSON: {error}. Fit or copy the artifact again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadArtifact(f"artifact: {path} is no manifest of {FORMAT}.", field="artifact")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtifactMismatch(
            f"artifact: {folder} has format version {manifest.get('format_version')}; this guard reads version "
            f"{FORMAT_VERSION}. Fit it again, or use the version of the guard that made it."
        )
    needed = ("method", "created_at", "fingerprint", "input", "classes", "settings", "null", "threshold", "files")
    missing = [key for key in (*needed, "corrections") if key not in manifest]
    if missing:
        raise ArtifactDamaged(f"artifact: {path} lacks {', '.join(missing)}. Fit or copy the artifact again.")
    if manifest.get("sha256") != _seal(manifest):
        raise ArtifactDamaged(f"artifact: {path} was altered since the fit. Fit or copy the artifact again.")
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    """SHA-256 over the manifest, its own key left out."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
