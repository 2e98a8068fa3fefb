"""Why a request gets no answer, and with which HTTP status.

::

    GuardError
    ├── BadInput
    │   └── BadRequest            400  cannot be read: not JSON, a key missing, a wrong type, a broken image
    │       ├── Unauthorized      401  no API key, or an unknown one, where keys are required
    │       ├── Forbidden         403  a known key without the role that the route takes
    │       ├── NotFound          404  no such model or version
    │       ├── TooLarge          413  more bytes, images or pixels than this server takes
    │       ├── UnknownMedia      415  a content type or image format that this route does not read
    │       └── UnfitTensor       422  readable, but not what this model takes: shape, range, not finite
    ├── PassFailed                500  the classifier itself failed on this input
    ├── UpstreamFailed            502  the original's server cannot be reached, failed, or answered nonsense
    │   ├── UpstreamLate          504  it took too long
    │   ├── UpstreamUnfit              its answer, or what it takes, is not as the settings say
    │   └── UpstreamRefused            it said 401, 403 or 404, and so do we
    ├── StartFailed                    Ray Serve could not bring the replicas up (command line: exit status 1)
    └── Unavailable               503  try again later (Retry-After)
        ├── QueueFull                  shedding load
        ├── ShuttingDown               draining
        ├── UpstreamBusy               the original's server sheds load; its Retry-After
        └── NoVerdict                  a network failed or was late, and on_failure is closed
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from guard.errors import BadInput, GuardError


class BadRequest(BadInput):
    """The request cannot be read. ``field`` names the offending key, tensor or header.

    headers: what the answer carries besides."""

    status = 400
    headers: Mapping[str, str] = MappingProxyType({})


class Unauthorized(BadRequest):
    """No API key, or an unknown one, where keys are required."""

    status = 401
    headers = MappingProxyType({"www-authenticate": "Bearer"})


class Forbidden(BadRequest):
    """The key is known and has not the role that this takes."""

    status = 403


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


class UpstreamFailed(GuardError):
    """The server or deployment that runs the original network cannot be reached, failed, or answered nonsense.

    field: the setting or header that the sentence is about."""

    status = 502

    def __init__(self, message: str, *, field: str = "upstream") -> None:
        super().__init__(message)
        self.field = field


class UpstreamLate(UpstreamFailed):
    """It took too long to answer."""

    status = 504


class UpstreamUnfit(UpstreamFailed):
    """Its answer, or what it takes, is not as the settings say."""


class UpstreamRefused(UpstreamFailed):
    """It refused the request with a status that means the same to our client."""

    def __init__(self, message: str, *, field: str = "upstream", status: int = 502) -> None:
        super().__init__(message, field=field)
        self.status = status


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


class UpstreamBusy(Unavailable):
    """The server or deployment that runs the original network sheds load, and says for how long."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoVerdict(Unavailable):
    """A network failed or was late, and the server is set to refuse rather than answer unguarded."""
