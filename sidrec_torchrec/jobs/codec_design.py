"""Which stages to give DPCA: measures a few lists on a source of an item file, and names one."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from sidrec_torchrec.codec.alphabet import format_stages
from sidrec_torchrec.codec.design import Candidate, Design, DesignConfig, design, stage_lists
from sidrec_torchrec.errors import DataError, check_at_least, check_share
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.progress import stage

_CAPTION = (
    "error: relative squared, of items held out; kflop: to encode a vector; s: to encode a million; KiB: of the basis"
)


@dataclass(frozen=True, kw_only=True)
class CodecDesignConfig(DesignConfig, JobConfig):
    """What to measure on.

    Args:
        items: item file, or the data folder that has it. Items without the source are left out.
        source: column of vectors.
        held_out: share of the items to measure on.
        max_items: draw at most this many items, up to 32,768; bounds time and memory.
        seed: of the draw and of the fits.

    Raises:
        ValueError: on values out of range.
    """

    items: Path
    source: str
    held_out: float = 0.25
    max_items: int = 32_768

    def __post_init__(self) -> None:
        super().__post_init__()
        JobConfig.__post_init__(self)
        check_share(self, "held_out")
        check_at_least(self, 2, "max_items")


def main(config: CodecDesignConfig) -> Design:
    """Prints every candidate, least error first, and the choice.

    Raises:
        DataError: if the file is missing or broken, has no such source, or fewer than two items have it.
    """
    x_ND = draw(config)
    held_out = max(1, int(len(x_ND) * config.held_out))
    with stage("design", len(stage_lists(config.bits)) * len(config.beams), show=True) as bar:

        def report(candidate: Candidate) -> None:
            bar.advance(note=f"{format_stages(candidate.stages)}, beam {candidate.beam}: {candidate.error:.4f}")

        result = design(x_ND[held_out:], x_ND[:held_out], config, report=report)
    console = Console()
    console.print(_table(config, result, len(x_ND) - held_out, held_out))
    console.print(f"Chosen: {result.reason}.", highlight=False, markup=False, soft_wrap=True)
    return result


def draw(config: CodecDesignConfig) -> Tensor:
    """Vectors of the source, float32 [N, D], of items drawn by ``seed``; those without it are left out."""
    items = ItemStream.open(config.items, (config.source,), {}).sample(config.seed)
    x_ND = items.sources[config.source][items.present[config.source]][: config.max_items]
    if len(x_ND) < 2:
        raise DataError(
            f"{config.items}: column '{config.source}' holds {len(x_ND)} vectors in the items drawn; a design needs "
            "at least one to fit on and one to measure on"
        )
    return x_ND


def _table(config: CodecDesignConfig, result: Design, trained: int, held_out: int) -> Table:
    title = f"{config.source} in at most {config.bits:g} bits: fitted on {trained:,} items, measured on {held_out:,}"
    table = Table(title=title, caption=_CAPTION)
    table.add_column("stages", overflow="fold")
    for name in ("beam", "bits", "error", "kflop", "s / million", "KiB"):
        table.add_column(name, justify="right")
    for candidate in result.candidates:
        table.add_row(
            format_stages(candidate.stages),
            str(candidate.beam),
            f"{candidate.bits:.1f}",
            f"{candidate.error:.4f}",
            f"{candidate.flops / 1e3:,.0f}",
            f"{candidate.seconds:,.1f}",
            f"{candidate.codebook_bytes / 1024:,.0f}",
            style="bold" if candidate is result.chosen else None,
        )
    return table
