"""Where the numbers of training go: TensorBoard, MLflow, Weights & Biases, or a tracker of another package."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from sidrec_torchrec.errors import SidrecError, first_line
from sidrec_torchrec.files import read_object, write_json
from sidrec_torchrec.output import warn
from sidrec_torchrec.processes import on_first_process
from sidrec_torchrec.registry import Registry
from sidrec_torchrec.storage.mirror import publish
from sidrec_torchrec.training.config import plain_fields
from sidrec_torchrec.training.group import Processes
from sidrec_torchrec.training.runs import CONFIG_FILE, RESULT_FILE, run_config

_IDS_FILE = "trackers.json"  # in a run's folder: what each tracker calls the run
_TEST = "test"  # of a result: the metrics of the test


class Tracker(ABC):
    """One place that numbers go to. Whatever its methods raise is said once, and nothing more is sent there.

    Args:
        folder: of the run; ``run_name`` makes its name.
        config: the job's, flat: ``model.dim`` by its value.
        id: what ``id`` was when the run began, if this goes on with an interrupted one.

    Attributes:
        id: what the tracker calls the run; None if the folder itself is all that it needs to go on.
    """

    id: str | None = None

    @abstractmethod
    def __init__(self, folder: Path, config: Mapping[str, Any], id: str | None) -> None: ...

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes numbers by name, such as ``train/loss``.

        Args:
            values: finite or not.
            step: what was trained on before: batches of a tokenizer, events of a ranker.
        """

    def artifact(self, path: Path) -> None:
        """Keeps a file of the run."""

    def flush(self) -> None:
        """Sends what is held back; called after each epoch."""

    @abstractmethod
    def close(self, *, finished: bool) -> None:
        """Ends the run, or, if it is not finished, leaves it to be gone on with."""


TRACKERS: Registry[type[Tracker]] = Registry(
    "tracker",
    {
        "mlflow": "sidrec_torchrec.training.mlflow_tracker:MLflow",
        "wandb": "sidrec_torchrec.training.wandb_tracker:WeightsAndBiases",
    },
)


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """Files in the run's folder ``tensorboard``."""

    def __init__(self, folder: Path, config: Mapping[str, Any], id: str | None) -> None:
        self._folder = folder / "tensorboard"

    @cached_property
    def _writer(self) -> SummaryWriter:  # a job that is refused before it trains leaves no file
        return SummaryWriter(self._folder)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()
        self._publish()

    def close(self, *, finished: bool) -> None:
        if "_writer" in vars(self):
            self._writer.close()
            self._publish()

    def _publish(self) -> None:
        for file in self._folder.glob("*"):
            publish(file)


class Trackers:
    """Several trackers as one; one that fails is said once and left out, and training goes on.

    Args:
        opened: by name; none on processes other than the main one.
    """

    def __init__(self, opened: Mapping[str, Tracker] | None = None) -> None:
        self._opened = dict(opened or {})
        self._step = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See ``Tracker``."""
        self._step = step
        self._each(lambda tracker: tracker.log(values, step))

    def result(self, folder: Path) -> None:
        """Sends the test's metrics, and the files that say what the run was and came to."""
        files = [folder / name for name in (CONFIG_FILE, RESULT_FILE) if (folder / name).exists()]
        tested = read_object(folder / RESULT_FILE).get(_TEST) if folder / RESULT_FILE in files else None
        if isinstance(tested, dict):
            numbers = {f"{_TEST}/{n}": v for n, v in tested.items() if isinstance(v, float)}
            self._each(lambda tracker: tracker.log(numbers, self._step))
        for file in files:
            self.artifact(file)

    def artifact(self, path: Path) -> None:
        """See ``Tracker``."""
        self._each(lambda tracker: tracker.artifact(path))

    def flush(self) -> None:
        """See ``Tracker``."""
        self._each(lambda tracker: tracker.flush())

    def close(self, *, finished: bool) -> None:
        """See ``Tracker``."""
        self._each(lambda tracker: tracker.close(finished=finished))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._opened.items()):
            try:
                act(tracker)
            except Exception as error:  # noqa: BLE001 - whatever a client raises when its server is away
                _warn(name, error)
                del self._opened[name]


def run_name(folder: Path) -> str:
    """What people see a run called: ``side/seed-0``, say, of a pipeline's."""
    return "/".join(folder.resolve().parts[-2:])


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError unless each name is a tracker's, once; loads none of them."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker '{name}'; there are {', '.join(TRACKERS)}")
        if names.count(name) > 1:
            raise ValueError(f"tracker: '{name}' is named twice; name it once")


@contextmanager
def open_trackers(names: Sequence[str], folder: Path, processes: Processes) -> Iterator[Trackers]:
    """Trackers of the run in ``folder``, open as long as the block runs; call on every process, the main one alone sends.

    At the block's end, the test's metrics are sent, and ``run.json`` and ``metrics.json`` as they are then.

    Raises:
        SidrecError: if a tracker's package is not installed, on every process.
    """
    classes: dict[str, type[Tracker]] = {}
    on_first_process(lambda: classes.update({name: _loaded(name) for name in names}))
    opened = _opened(classes, folder) if processes.is_main else {}
    trackers, finished = Trackers(opened), False
    try:
        yield trackers
        trackers.result(folder)
        finished = True
    finally:
        trackers.close(finished=finished)


def _loaded(name: str) -> type[Tracker]:
    try:
        return TRACKERS[name]
    except SidrecError as error:
        if isinstance(error.__cause__, ImportError) and TRACKERS.source(name):
            raise SidrecError(f"{error}; pip install 'sidrec-torchrec[{name}]'") from error
        raise


def _opened(classes: Mapping[str, type[Tracker]], folder: Path) -> dict[str, Tracker]:
    path = folder / _IDS_FILE
    ids, config = read_object(path) if path.exists() else {}, plain_fields(run_config(folder))
    opened = {}
    for name, tracker in classes.items():
        try:
            opened[name] = tracker(folder, config, ids.get(name))
        except Exception as error:  # noqa: BLE001 - as above
            _warn(name, error)
    now = {name: tracker.id for name, tracker in opened.items() if tracker.id is not None}
    if now.items() - ids.items():
        write_json(path, ids | now, sealed=True)
    return opened


def _warn(name: str, error: Exception) -> None:
    warn(f"tracker {name}: {first_line(error)}; nothing more is sent to it, and training goes on")
