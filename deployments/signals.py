"""How a server ends: SIGTERM and Ctrl-C alike, once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def interrupt_on_signals() -> None:
    """SIGTERM and Ctrl-C both raise KeyboardInterrupt, once: the shutdown that follows must not be cut short."""

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        for name in SIGNALS:
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    for name in SIGNALS:
        signal.signal(name, interrupt)


def until_interrupted() -> None:
    """Wait for one of the signals; `interrupt_on_signals` comes first."""
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        return
