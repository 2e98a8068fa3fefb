"""Why a request gets no answer, and with which HTTP status.

::

    GuardError
    ├── BadInput
    │   └── BadRequest            400  cannot be read: not JSON, a key missing, a wrong type, a broken image
    │       ├── NotFound          404  no such model or version
    │       ├── TooLarge          413  more bytes, images or pixels than this server takes
    │       ├── UnknownMedia      415  a content type or image format that this route does not read
    │       └── UnfitTensor       422  readable, but not what this model takes: shape, range, not finite
    ├── PassFailed                500  the classifier itself failed on this input
    ├── StartFailed                    Ray Serve could not bring the replicas up (command line: exit status 1)
    └── Unavailable               503  try again later (Retry-After)
        ├── QueueFull                  shedding load
        ├── ShuttingDown               draining
        └── NoVerdict                  a network failed or was late, and on_failure is closed
"""

from __future__ import annotations

from guard.errors import BadInput, GuardError


class BadRequest(BadInput):
    """The request cannot be read. ``field`` names the offending key, tensor or header."""

    status = 400


class NotFound(BadRequest):
    """No such model or version."""

    status = 404


class TooLarge(BadRequest):
    """More bytes, images or pixels than this server takes."""

    status = 413


class UnknownMedia(BadRequest):
    """A content type or an image format that this route does not read."""

    status = 415


class UnfitTensor(BadRequest):
    """Readable, but not what this model takes."""

    status = 422


class PassFailed(GuardError):
    """The classifier itself failed on this input; the reason is in the server's log."""

    status = 500


class StartFailed(GuardError):
    """Ray Serve could not bring the replicas up."""


class Unavailable(GuardError):
    """No answer now; the same request may succeed later."""

    status = 503
    retry_after_s = 1


class QueueFull(Unavailable):
    """More work is waiting than this replica holds."""


class ShuttingDown(Unavailable):
    """The replica is draining."""


class NoVerdict(Unavailable):
    """A network failed or was late, and the server is set to refuse rather than answer unguarded."""
