"""Classes by name, of one kind: arms, readers, quantizers, converters. Other packages add theirs by entry points."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from sidrec_torchrec.errors import SidrecError, first_line

Registered = TypeVar("Registered")


class Registry(Generic[Registered]):
    """What there is of one kind, by name: first what is registered, in that order, then what is loaded when asked for.

    Another package adds to it by an entry point, which is loaded when its name is asked for; names alone load nothing::

        [project.entry-points."sidrec_torchrec.arms"]
        my-arm = "my_package.arms:MyArm"

    Args:
        kind: what it holds, in the singular, for messages: ``arm``.
        late: entries of this package that are loaded like those of others, as ``module:object`` by name; for what
            takes long to import.
    """

    def __init__(self, kind: str, late: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, Registered] = {}
        self._late = late or {}

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
            SidrecError: on an unknown name; lists those there are. On an entry point that cannot be loaded; names it.
        """
        if name not in self._entries:
            if name not in self:
                raise SidrecError(f"unknown {self.kind} '{name}'; there are {', '.join(self)}")
            self._load(self._own.get(name) or self._points[name])
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._late or name in self._points

    def source(self, name: str) -> str | None:
        """Where an entry of this package will be loaded from, as ``module:object``; None if it is loaded, or another package's."""
        return None if name in self._entries else self._late.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._entries, *self._points]))

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        """What can be loaded, by name: of this package, and what others offer."""
        return {point.name: point for point in entry_points(group=self._group)} | self._own

    @cached_property
    def _own(self) -> dict[str, EntryPoint]:
        """What can be loaded of this package; known at once, whereas others' are looked for in all that is installed."""
        return {name: EntryPoint(name, value, self._group) for name, value in self._late.items()}

    @property
    def _group(self) -> str:
        return f"sidrec_torchrec.{self.kind}s"

    def _load(self, point: EntryPoint) -> None:
        try:
            loaded = point.load()
        except Exception as error:  # whatever another package's import may raise
            raise SidrecError(
                f"the {self.kind} '{point.name}' cannot be loaded from {point.value}: {first_line(error)}"
            ) from error
        self._entries.setdefault(point.name, loaded)  # its module may have registered it by this name itself
