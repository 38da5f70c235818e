"""A trace of some of a run's batches, by torch.profiler, for Perfetto or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sidrec_torchrec.storage.mirror import publish
from sidrec_torchrec.training.group import Processes
from sidrec_torchrec.training.progress import say

PROFILE_FOLDER = "profile"


def profiled(text: str) -> tuple[int, int] | None:
    """First and last batch that ``10:20`` names, counted from 1; None if ``text`` is empty.

    Raises:
        ValueError: if it is something else.
    """
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"profile names the first and last batch of a trace, such as 10:20; got '{text}'")
    return int(first), int(last)


class Profiler:
    """Traces the batches ``text`` names, counted from where this process began or went on, and writes a file per process.

    Args:
        text: as ``profiled`` takes it; empty: nothing is traced.
        folder: the run's.
        processes: the group.
    """

    def __init__(self, text: str, folder: Path, processes: Processes) -> None:
        self._batches = profiled(text)
        self._folder = folder / PROFILE_FOLDER
        self._processes = processes
        self._count = 0  # batches trained on
        self._running: profile | None = None

    def before_step(self) -> None:
        """Before each batch is trained on, or found not to be there."""
        if self._batches is None or self._running is not None or self._count + 1 != self._batches[0]:
            return
        cuda = [ProfilerActivity.CUDA] if self._processes.device.type == "cuda" else []
        self._running = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True)
        self._running.start()

    def after_step(self) -> None:
        """After each batch."""
        self._count += 1
        if self._batches is not None and self._count == self._batches[1]:
            self.stop()

    def stop(self) -> None:
        """Ends the trace, if there is one, and writes it."""
        if self._running is None:
            return
        if self._processes.device.type == "cuda":
            torch.cuda.synchronize()
        self._running.stop()
        assert self._batches is not None
        self._folder.mkdir(exist_ok=True)
        first, last = self._batches[0], min(self._count, self._batches[1])
        path = self._folder / f"batches-{first}-{last}-process-{self._processes.rank}.json.gz"
        self._running.export_chrome_trace(str(path))
        publish(path)
        self._running = None
        if self._processes.is_main:
            say(f"{path}: a trace of batches {first} to {last}; open it at ui.perfetto.dev or chrome://tracing")
