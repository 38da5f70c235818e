"""Exports a trained ranker of SIDs, as one file that a server loads without TorchRec."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._inductor.exc import InductorError
from torch.export import ExportedProgram

from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.data.features import Features
from sidrec_torchrec.data.tasks import DEFAULT_TASKS
from sidrec_torchrec.data.user_lists import list_names
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.files import atomic_path, sha256_of
from sidrec_torchrec.output import show
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.ranker.scorer import FORMAT, METADATA, Scorer
from sidrec_torchrec.ranker.serving import INPUTS, ServingRanker, WithWords, alone, export, more_inputs, requests_of
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import stage

_TOLERANCE = 1e-5
_CHECKED = 256  # targets, at most


@dataclass(frozen=True, kw_only=True)
class ExportConfig(JobConfig):
    """Which ranker to export, and where to.

    Args:
        ranker: folder train-ranker wrote, of an arm that reads SIDs.
        out: file to write, ``.pt2``.
        compiled: whether to compile it for this processor (AOTInductor; about a minute, and a C++ compiler is needed);
            else the file is a program that torch interprets on any machine.
    """

    ranker: Path
    out: Path
    compiled: bool = True


def main(config: ExportConfig) -> dict[str, Any]:
    """Exports the best epoch, checks that it predicts what the trained ranker does, and only then writes the file.

    Returns:
        The package's metadata; see ``Scorer``.

    Raises:
        SidrecError: on a folder without a trained ranker, one that cannot be served, a missing compiler, or predictions
            that differ.
    """
    _check(config)
    cpu = torch.device("cpu")
    with process_group() as processes:
        trained = TrainedRanker.open(config.ranker)
        parts = trained.parts()
        ranker = parts.whole(cpu).eval()
        model = ServingRanker.of(ranker, parts.arm)
        trained.load(ranker)
        user_values = trained.trained_on.prepared.vocabularies
        prepared = parts.prepared
        values = [own.name for own in prepared.regressions]
        metadata = describe(model.sids, user_values, prepared.tasks, prepared.features, values)
        features = WithWords(parts.arm)
        batch = next(iter(parts.recipe.batches(parts.prepared, features, "test", processes)))
        if processes.is_main:
            with stage("export", 2, show=True) as progress, tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "ranker.pt2"
                program = export(model)
                progress.advance(1)
                write(program, metadata, file, compiled=config.compiled)
                check_predictions(ranker, batch, features, Scorer(file))
                with atomic_path(config.out) as temporary:
                    shutil.copyfile(file, temporary)
                progress.advance(1)
            show(f"{config.out}: sha256 {sha256_of(config.out)}")
            for sid in metadata["sids"]:
                show(f"{config.out}: reads SIDs '{sid['name']}' of {sid['stages']}, fingerprint {sid['fingerprint']}")
    return metadata


def describe(
    sids: Mapping[str, SIDSpec],
    user_values: dict[str, Any],
    tasks: tuple[str, ...] = DEFAULT_TASKS,
    features: Features | None = None,
    regressions: Iterable[str] = (),
) -> dict[str, Any]:
    """What a server must know of a package; see ``Scorer``."""
    limits = [limit for spec in sids.values() for limit in spec.word_limits]
    features = features or Features()
    lists = {name: user_values[name]["lists_of"] for name in list_names(user_values)}
    fixed = {"words": len(limits), "user features": len(user_values) - len(lists), "user lists": len(lists)}
    fixed |= {"features": len(features), "known features": len(features.known)}
    inputs = INPUTS | more_inputs(len(features), len(lists))
    return {
        "format": FORMAT,
        "sids": [{"name": name, **spec.to_json(), "words": spec.num_words} for name, spec in sids.items()],
        "last_words": [limit - 1 for limit in limits],
        "inputs": {name: [fixed.get(size, size) for size in shape] for name, shape in inputs.items()},
        "user_features": {name: kept for name, kept in user_values.items() if name not in lists},
        **({"user_lists": lists} if lists else {}),
        "tasks": list(tasks),
        **({"regressions": [*regressions]} if regressions else {}),
        **({"features": features.to_json()} if len(features) else {}),
        "torch": torch.__version__,
    }


def write(program: ExportedProgram, metadata: dict[str, Any], file: Path, *, compiled: bool) -> None:
    """Writes a package that ``Scorer`` loads."""
    text = json.dumps(metadata)
    if not compiled:
        torch.export.save(program, file, extra_files={METADATA: text})
        return
    options: dict[str, Any] = {"aot_inductor.metadata": {METADATA: text}}
    if _makes_vectors(program):
        options["cpp.dynamic_threads"] = True  # as many as the server has, not as many as there are here
    else:
        options["cpp.threads"] = 1  # what is left between operators is small: to start threads for it takes longer
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)
    except InductorError as error:
        if not isinstance(error.inner_exception, OSError):
            raise
        raise SidrecError(
            f"torch's compiler cannot write ({error.inner_exception}); name a folder that has room in TORCHINDUCTOR_CACHE_DIR"
        ) from error


def _makes_vectors(program: ExportedProgram) -> bool:
    """Whether events become vectors, besides those that operators make and use up."""
    makers = torch.ops.sidrec.shared_attention.default, torch.ops.sidrec.top_events.default
    return any(node.target in makers for node in program.graph.nodes)


@torch.no_grad()
def check_predictions(ranker: Ranker, batch: RankBatch, features: WithWords, scorer: Scorer) -> None:
    """Refuses a package that does not predict what the ranker does.

    Args:
        ranker: the trained ranker.
        batch: of sequences with those features.
        features: of the ranker's arm.
        scorer: the package.

    Raises:
        SidrecError: says by how much they differ.
    """
    small = alone(batch, _CHECKED)
    _, expected = ranker(small)
    num_known = len(ranker.head.features.known)
    actual = scorer(**requests_of(small, features.words(small), num_known, ranker.user_lists))
    # of values, which may be of any size, what they differ by is told as a share of it
    size_SK = expected.prediction.abs().clamp_min(1)
    difference = float(((actual.view_as(expected.prediction) - expected.prediction) / size_SK).abs().max())
    if not difference <= _TOLERANCE:
        raise SidrecError(f"the exported ranker's predictions differ by {difference:.1e} from the trained one's")


def _check(config: ExportConfig) -> None:
    if config.out.suffix != ".pt2":
        raise SidrecError(f"{config.out}: torch wants a name that ends in .pt2")
    compiler = os.environ.get("CXX", "g++")  # the one torch takes
    if config.compiled and shutil.which(compiler) is None:
        raise SidrecError(
            f"no C++ compiler '{compiler}': install one, name one in CXX, or export with --compiled false"
        )
