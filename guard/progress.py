"""How long work reports progress: a function that opens a bar. The library is silent unless given another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """``with progress("what", total) as advance: advance(1)``; total in the work's own units."""

    def __call__(self, what: str, total: int, /) -> AbstractContextManager[Callable[[int], None]]: ...


@contextmanager
def silent(what: str, total: int, /) -> Iterator[Callable[[int], None]]:
    """Report nothing."""
    yield lambda done: None


@contextmanager
def bars(what: str, total: int, /) -> Iterator[Callable[[int], None]]:
    """A bar on standard error that ends with the time taken; plain lines where that is no terminal."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, leave=True, mininterval=0.5, dynamic_ncols=True) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        yield advance
