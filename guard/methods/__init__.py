"""The methods, one short file each, listed in one plain dict."""

from __future__ import annotations

from guard.methods.base import Estimator, Fitted
from guard.methods.mmac import Mmac

METHODS: dict[str, type[Estimator]] = {"mmdf": Mmac}

__all__ = ["METHODS", "Estimator", "Fitted"]
