"""The errors of the guard.

Every class name is a verdict, every message says what was expected, what came and what to do about it::

    GuardError
    ├── BadInput                 what the caller gave cannot be used (command line: exit status 2; HTTP: 4xx)
    │   ├── BadModel             the classifier cannot be built or loaded
    │   │   ├── CaptureFailed    torch.export could not capture it
    │   │   └── NothingToCorrect it has no activation site that a correction could act on
    │   ├── BadData              images or labels fail a check at the door
    │   ├── BadSetting           a setting is out of its range
    │   └── BadArtifact          the folder is not an artifact that this version can load
    │       ├── ArtifactDamaged  a file is missing, truncated or altered
    │       └── ArtifactMismatch it was made for another model, or by another format version
    └── NotConverged             a fit ended without a usable result
"""

from __future__ import annotations


class GuardError(Exception):
    """Base of everything that the guard raises on purpose."""


class BadInput(GuardError):
    """The caller gave something that cannot be used.

    Args:
        message: what was expected, what came, and the remedy.
        field: the name of the offending argument, key or tensor, for machine-readable answers.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class BadModel(BadInput):
    """The classifier cannot be built or loaded."""


class CaptureFailed(BadModel):
    """torch.export could not capture the classifier."""


class NothingToCorrect(BadModel):
    """The classifier has no activation site that a correction could act on."""


class BadData(BadInput):
    """Images or labels fail a check at the door."""


class BadSetting(BadInput):
    """A setting is out of its range."""


class BadArtifact(BadInput):
    """The folder is not an artifact that this version can load."""


class ArtifactDamaged(BadArtifact):
    """A file of the artifact is missing, truncated or altered."""


class ArtifactMismatch(BadArtifact):
    """The artifact was made for another model, or in another format version."""


class NotConverged(GuardError):
    """A fit ended without a usable result."""
