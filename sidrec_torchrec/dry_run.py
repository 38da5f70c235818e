"""What a command would do: its config, whole, and whether its output folder is new, resumed, finished, or another run's."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from sidrec_torchrec.output import show
from sidrec_torchrec.storage.mirror import bring
from sidrec_torchrec.storage.urls import place_of
from sidrec_torchrec.training.runs import look


def print_plan(name: str, function: Callable[[Any], Any], config: Any) -> None:
    """Prints it, and does nothing.

    Args:
        name: of the command.
        function: which the command calls. If its module has a function ``plan``, that gives its steps: name and state of each.
        config: that it would be called with.

    Raises:
        SidrecError: if the command would be refused at once, say for an input that is not there.
    """
    print(f"# sidrec {name} --config FILE does the same with this as FILE")
    print(yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=110).rstrip())
    steps = getattr(sys.modules[function.__module__], "plan", None)
    if steps is not None:
        for step, state in steps(config).items():
            show(f"# {step}: {state}")
        return
    inputs = _inputs(config)
    for file in inputs:
        if not file.exists():
            show(f"# {file}: not there; the command says whether it can do without")
    out = getattr(config, "out", None)
    if out is None:
        print("# nothing is kept in a folder")
    elif out.is_dir() or not out.suffix:
        show(f"# {out}: {look(out, config, inputs)}")
    else:
        show(f"# {out}: {'there is one, which would be replaced' if bring(out).exists() else 'new'}")


def _inputs(config: Any) -> list[Path]:
    """What the run would depend on, where the config says so."""
    files = getattr(config, "files", None)
    return list(files()) if files is not None and getattr(config, "is_backtest", True) else []


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        place = place_of(value)
        return str(value) if place is None else place.url
    return value
