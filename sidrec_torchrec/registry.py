"""Classes by name, of one kind: arms, readers, quantizers, converters. Other packages add theirs by entry points."""

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from sidrec_torchrec.errors import SidrecError

Registered = TypeVar("Registered")


class Registry(Generic[Registered]):
    """What there is of one kind, by name, in the order of registration.

    Another package adds to it by an entry point whose value is a module that registers, or what is to be registered::

        [project.entry-points."sidrec_torchrec.arms"]
        my-arm = "my_package.arms:MyArm"

    Args:
        kind: what it holds, in the singular, for messages: ``arm``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Registered] = {}
        self._is_complete = False

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Decorator: enters a class, or whatever the kind is, under ``name``.

        Raises:
            ValueError: if the name is taken.
        """

        def enter(entry: Registered) -> Registered:
            if self._entries.setdefault(name, entry) is not entry:
                raise ValueError(f"there is a {self.kind} '{name}' already: {self._entries[name]!r}; take another name")
            return entry

        return enter

    def __getitem__(self, name: str) -> Registered:
        """What is registered as ``name``.

        Raises:
            SidrecError: on an unknown name; lists those there are.
        """
        self._complete()
        if name not in self._entries:
            raise SidrecError(f"unknown {self.kind} '{name}'; there are {', '.join(self)}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        self._complete()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._complete()
        return iter(tuple(self._entries))

    def _complete(self) -> None:
        """Loads what other packages offer, once."""
        if self._is_complete:
            return
        self._is_complete = True
        for point in entry_points(group=f"sidrec_torchrec.{self.kind}s"):
            loaded = point.load()  # a module has registered by now
            if isinstance(loaded, type) or callable(loaded):
                self._entries.setdefault(point.name, loaded)
