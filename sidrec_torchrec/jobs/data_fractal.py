"""Writes a fractal expansion of a data folder."""

from typing import Any

from sidrec_torchrec.data.fractal import FractalConfig, write_fractal
from sidrec_torchrec.output import show


def main(config: FractalConfig) -> dict[str, Any]:
    """Writes the expansion and says how it compares with its parent; returns the content of ``fractal.json``."""
    summary = write_fractal(config, progress=True)
    show(
        f"{config.out}: {summary['users']:,} users, {summary['items']:,} items, {summary['events']:,} events; density "
        f"{summary['density']:.4f}, parent's {summary['parent_density']:.4f}"
    )
    for what in ("events per user", "events per item"):
        for whose, quantiles in summary["quantiles"].items():
            show(f"{what}, {whose}: " + ", ".join(f"{name} {count:,}" for name, count in quantiles[what].items()))
    return summary
