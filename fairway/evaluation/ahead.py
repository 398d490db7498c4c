"""Work whose order is known beforehand, done by a thread one piece ahead of its use."""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Ahead(Generic[Result]):
    """A function for whose arguments `keys` it will be called, in that order as a rule; other orders only take longer.

    Drawing first factors takes a second and more of a CPU, in which a GPU need not wait.
    """

    def __init__(self, function: Callable[..., Result], keys: Sequence[tuple[Hashable, ...]]) -> None:
        self._function, self._following = function, dict(pairwise(keys))
        self._thread = ThreadPoolExecutor(1)
        self._begun: dict[tuple[Hashable, ...], Future[Result]] = {}

    def __call__(self, *key: Hashable) -> Result:
        """The function of `key`; that of the key behind it is begun."""
        future = self._begin(key)
        self._begun.clear()
        if key in self._following:
            following = self._following[key]
            self._begun[following] = self._begin(following)
        return future.result()

    def _begin(self, key: tuple[Hashable, ...]) -> Future[Result]:
        return self._begun.get(key) or self._thread.submit(self._function, *key)
