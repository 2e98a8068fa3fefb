"""W3C Trace Context: which ``traceparent`` is valid."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Version, trace, parent, flags. Version ff and zeros as trace or parent are invalid; later versions may add parts.
FORMAT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?")


def traceparent(given: Sequence[str]) -> str | None:
    """The one valid value among the headers of a request; None where there is none, or several."""
    match = FORMAT.fullmatch(given[0]) if len(given) == 1 else None
    return None if match is None or (match[1] == "00" and match[2] is not None) else match[0]
