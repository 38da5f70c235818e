"""Weights & Biases: a run of a project, online or, with ``WANDB_MODE=offline``, in the run's folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from sidrec_torchrec.output import say
from sidrec_torchrec.training.trackers import Tracker, run_name

_STEP = "step"


class WeightsAndBiases(Tracker):
    """A run of the project that ``WANDB_PROJECT`` names, else of ``sidrec``."""

    def __init__(self, folder: Path, config: Mapping[str, Any], id: str | None) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "sidrec"),
            name=run_name(folder),
            id=id,
            resume="allow",
            config=dict(config),
            dir=str(folder),
            reinit="create_new",  # one process trains several rankers, one after the other
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        self.id = self._run.id
        # a step of our own: an interrupted run goes back to its last checkpoint, and wandb's cannot
        self._run.define_metric("*", step_metric=_STEP)
        if self._run.url:
            say(f"wandb: {self._run.url}")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, _STEP: step})

    def artifact(self, path: Path) -> None:
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
