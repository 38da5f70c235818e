"""Names that data give, such as those of columns, where they become names of files or of modules: any name may stand there."""

import re
from collections.abc import ItemsView, Iterator, KeysView
from urllib.parse import unquote

from torch import nn

_SPECIAL = re.compile(r"[%./\\\x00-\x1f\x7f]")  # paths, names of modules, and the escapes themselves
_TAKEN = frozenset(dir(nn.ModuleDict()))  # a module of such a name would hide an attribute
_EMPTY = "%"


def escape(name: str) -> str:
    """As the name of a file in its folder, or of a module: different for different names, and most stay as they are.

    ``../x`` is ``%2E%2E%2Fx``; ``training``, which every module has, is ``%74raining``.
    """
    if not name:
        return _EMPTY
    if name in _TAKEN:
        return f"%{ord(name[0]):02X}{name[1:]}"
    return _SPECIAL.sub(lambda match: f"%{ord(match[0]):02X}", name)


def unescape(name: str) -> str:
    """The name that ``escape`` was given."""
    return "" if name == _EMPTY else unquote(name)


class ModulesByName(nn.ModuleDict):
    """Modules by any names; those of their parameters are escaped."""

    def __getitem__(self, name: str) -> nn.Module:
        return super().__getitem__(escape(name))

    def __setitem__(self, name: str, module: nn.Module) -> None:
        super().__setitem__(escape(name), module)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(escape(name))

    def __iter__(self) -> Iterator[str]:
        return map(unescape, super().__iter__())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and escape(name) in self._modules

    def keys(self) -> KeysView[str]:
        return dict.fromkeys(self).keys()

    def items(self) -> ItemsView[str, nn.Module]:
        return dict(zip(self, self.values(), strict=True)).items()
