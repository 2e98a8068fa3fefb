"""The models of one server, by name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence

from deployments.engine.served import AnyServed
from deployments.errors import NotFound, Unavailable


class Catalogue:
    """All classifiers of a replica, in the order of the configuration; started and closed together."""

    def __init__(self, classifiers: Sequence[AnyServed] = ()) -> None:
        self._classifiers = {classifier.model.name: classifier for classifier in classifiers}
        self.doors: list[Callable[[], Awaitable[None]]] = []  # what else lets requests in: closed before the models

    def add(self, classifier: AnyServed) -> None:
        """Take in one more, which is started already."""
        self._classifiers[classifier.model.name] = classifier

    def __iter__(self) -> Iterator[AnyServed]:
        return iter(self._classifiers.values())

    def find(self, name: str | None = None, version: str | None = None) -> AnyServed:
        """The classifier of this name; without a name the only one there is.

        Raises:
            NotFound: no such model or version, or no name where there are several. Unavailable: none is loaded yet.
        """
        if not self._classifiers:
            raise Unavailable("no model is loaded yet: try again later")
        names = ", ".join(self._classifiers)
        if not name:
            if len(self._classifiers) > 1:
                raise NotFound(f"model: there are several: name one of {names}", field="model")
            (name,) = self._classifiers
        classifier = self._classifiers.get(name)
        if classifier is None:
            raise NotFound(f"model_name: expected {names}, got {name!r}", field="model_name")
        served = classifier.model.version
        if version and version != served:
            raise NotFound(
                f"model_version: {name} is served as version {served!r}, got {version!r}", field="model_version"
            )
        return classifier

    @property
    def ready(self) -> bool:
        return bool(self._classifiers) and all(classifier.ready for classifier in self)

    async def start(self) -> None:
        for classifier in self:
            await classifier.start()

    async def close(self) -> None:
        for close in self.doors:
            await close()
        await asyncio.gather(*(classifier.close() for classifier in self))

    def check(self) -> None:
        """Raise if a model can answer no request any more."""
        for classifier in self:
            classifier.check()
