"""What a run came to, told to the trackers that TorchX's launcher names (docs/torchx.md)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sidrec_torchrec.errors import first_line
from sidrec_torchrec.output import warn

_TRACKERS = "TORCHX_TRACKERS"  # the launcher's names for them, in the environment


def tell_launcher(step: str, result: Mapping[str, Any], *files: Path) -> None:
    """Gives the launcher's trackers, if it names any, the numbers and texts of a result, and where its files are.

    Call on every process of the group: a tracker may wait for all of them. One that fails is warned of, and ends nothing.

    Args:
        step: what of the launched command it is, such as ``rankers/side/seed-0``; empty for all of it.
        result: what it came to; what is nested goes by names such as ``test.ne_all``, lists do not go.
        files: to be kept with it.
    """
    if not os.environ.get(_TRACKERS):
        return
    prefix = f"{step}/" if step else ""
    try:
        from torchx.tracker import app_run_from_env  # takes half a second, and few runs need it

        launched = app_run_from_env()
        if dist.get_rank() == 0:
            launched.add_metadata(**_flat(result, prefix))
            for file in files:
                launched.add_artifact(f"{prefix}{file.name}", str(file.resolve()))
    except Exception as error:  # noqa: BLE001  whatever a client raises whose server is away
        warn(f"{_TRACKERS}={os.environ[_TRACKERS]}: {first_line(error)}; nothing is tracked, and the run goes on")


def _flat(result: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in result.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (bool, int, float, str)):
            flat[f"{prefix}{name}"] = value
    return flat
