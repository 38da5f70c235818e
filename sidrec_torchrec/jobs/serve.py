"""Serves an exported ranker over HTTP."""

from dataclasses import dataclass, field
from pathlib import Path

from sidrec_torchrec.errors import SidrecError, check_at_least
from sidrec_torchrec.server.limits import Limits
from sidrec_torchrec.training.config import JobConfig

_PACKAGES = ("fastapi", "pydantic", "starlette", "uvicorn")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(JobConfig):
    """What to serve, and where.

    Args:
        package: file that export wrote. It holds code that is run: serve only what you trust.
        sids: folders of its SIDs with an index, that requests may name items; none, if they bring SIDs.
        sha256: of the package, as export printed it; another file is refused.
        host: address to listen on.
        port: to listen on; 0 for any that is free.
        parallel: calls of the ranker at the same time.
        threads: that one call uses; 0 for as many as there are cores.
        limits: beyond which requests are refused.
    """

    package: Path
    sids: tuple[Path, ...] = ()
    sha256: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    parallel: int = 1
    threads: int = 0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "parallel")
        check_at_least(self, 0, "threads")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port must lie in 0 to 65535, got {self.port}")


def main(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT; see docs/serving.md.

    Raises:
        SidrecError: if the extra ``server`` is missing, the package cannot be loaded, or the port is taken.
        CodecMismatchError: if the SIDs are of another codec than the package's.
    """
    try:
        from sidrec_torchrec.server import app, reading, run
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _PACKAGES:
            raise
        raise SidrecError(f"a server needs {error.name}: pip install 'sidrec-torchrec[server]'") from None
    import torch

    from sidrec_torchrec.ranker.scorer import Scorer

    if config.threads:
        torch.set_num_threads(config.threads)
    scorer = Scorer(config.package, parallel=config.parallel, sha256=config.sha256 or None)
    lookups = reading.open_lookups(config.sids, scorer.metadata["sids"])
    reader = reading.RequestReader(scorer.metadata, lookups, config.limits)
    with run.listen(config.host, config.port) as listener:
        run.run(app.Service(scorer, reader, config.limits, config.parallel), listener, config.limits)
