"""MLflow: a run of an experiment, wherever ``MLFLOW_TRACKING_URI`` says."""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from sidrec_torchrec.training.trackers import Tracker, run_name

_AT_ONCE = 500  # metrics sent together: a request a batch would be waited for
_PARAMS_AT_ONCE = 100  # as many as MLflow takes
_LONGEST_PARAM = 500
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}  # training waits for MLflow
_NOT_IN_NAMES = re.compile(r"[^\w\-./ ]")


class MLflow(Tracker):
    """A run of the experiment that ``MLFLOW_EXPERIMENT_NAME`` names, else of ``sidrec``."""

    def __init__(self, folder: Path, config: Mapping[str, Any], id: str | None) -> None:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        self._client = MlflowClient()
        self._held: list[Metric] = []
        if id is not None:
            self._client.update_run(id, status="RUNNING")
        self.id = id or self._begin(folder, config)

    def _begin(self, folder: Path, config: Mapping[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "sidrec")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        run_id = self._client.create_run(experiment_id, run_name=run_name(folder)).info.run_id
        params = [Param(_name(key), str(value)[:_LONGEST_PARAM]) for key, value in config.items()]
        for first in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(run_id, params=params[first : first + _PARAMS_AT_ONCE])
        return run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._held += [Metric(_name(name), float(value), now, step) for name, value in values.items()]
        if len(self._held) >= _AT_ONCE:
            self.flush()

    def artifact(self, path: Path) -> None:
        self._client.log_artifact(self.id, str(path))

    def flush(self) -> None:
        held, self._held = self._held, []
        for first in range(0, len(held), _AT_ONCE):
            self._client.log_batch(self.id, metrics=held[first : first + _AT_ONCE])

    def close(self, *, finished: bool) -> None:
        self.flush()
        self._client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")


def _name(text: str) -> str:
    """As MLflow takes it."""
    return _NOT_IN_NAMES.sub("_", text)
