"""How a server ends: SIGTERM and Ctrl-C alike, once."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

POLL_S = 0.2
hangups: deque[Callable[[], None]] = deque()
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def interrupt_on_signals() -> None:
    """SIGTERM and Ctrl-C both raise KeyboardInterrupt, once: the shutdown that follows must not be cut short."""

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        for name in SIGNALS:
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    for name in SIGNALS:
        signal.signal(name, interrupt)


def on_hangup(act: Callable[[], None]) -> None:
    """``act`` on every SIGHUP from now on, in `until_interrupted`."""

    def note(_signal: int, _frame: FrameType | None) -> None:
        hangups.append(act)

    signal.signal(signal.SIGHUP, note)


def until_interrupted() -> None:
    """Wait for one of the signals; `interrupt_on_signals` comes first."""
    try:
        while True:
            while hangups:
                hangups.popleft()()
            time.sleep(POLL_S)  # a signal.pause() could miss the one that came before it
    except KeyboardInterrupt:
        return
