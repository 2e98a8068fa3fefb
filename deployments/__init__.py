"""The Ray Serve application of the guard.

Here lie what a server is told (``settings config upstream keys document``), the mode that turns a verdict into an
answer (``policy``), and the applications themselves. The way of a request goes through the rooms, each of which imports
only from those before it:

- ``protocol``: bytes become images, answers become bytes;
- ``originals``: the original network's logits, where it runs elsewhere;
- ``events``: what is told and kept of flagged requests, beside their answers;
- ``watch``: what all replicas counted, and whether it is an attack;
- ``engine``: a served model, from its queue to its verdict and its counters;
- ``http`` and ``grpc``: the two surfaces;
- ``replicas``, then ``app`` and ``composition``: all of it in Ray Serve; ``serve``: the command.

Everything before ``app`` is plain Python, without Ray, and tested so, but for ``originals.handle``, which asks a
deployment of Ray Serve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deployments.composition import GuardedClassifier, guarded

__all__ = ["GuardedClassifier", "guarded"]


def __getattr__(name: str) -> Any:
    """What composes with a user's own application, once it is asked for: it takes Ray Serve with it."""
    if name in __all__:
        from deployments import composition

        return getattr(composition, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
