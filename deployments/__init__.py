"""The Ray Serve application of the guard.

Rooms, each importing only from those before it: ``errors config`` ← ``policy bodies images batcher metrics`` ←
``tensors`` ← ``protocol plain passes originals`` ← ``served`` ← ``classifier wrapped`` ← ``ingress grpc_service
exposition replicas`` ← ``app composition`` ← ``serve``. Everything before ``app`` is plain Python, without Ray, and
tested so.
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
