"""Writes the synthetic corpus."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.output import show
from sidrec_torchrec.training.config import JobConfig


@dataclass(frozen=True, kw_only=True)
class DataSyntheticConfig(SyntheticConfig, JobConfig):
    """What to make, and where.

    Args:
        out: where the data folder goes.
    """

    out: Path

    def __post_init__(self) -> None:
        super().__post_init__()
        JobConfig.__post_init__(self)


def main(config: DataSyntheticConfig) -> dict[str, Any]:
    """Writes the corpus and says how well it can be predicted; returns the content of ``synthetic.json``."""
    corpus = SyntheticConfig(**{field.name: getattr(config, field.name) for field in fields(SyntheticConfig)})
    summary = write_synthetic(corpus, config.out, progress=True)
    show(
        f"{config.out}: {summary['events']:,} events, label rate {summary['label_rate']:.3f}, NE {summary['ne_user']:.3f} "
        f"knowing each user's label rate, {summary['ne_oracle']:.3f} knowing the true probabilities"
    )
    return summary
