"""How fast DPCA encodes, against faiss's residual quantizer, and against what no encoder can do without.

    python benchmarks/dpca_encode.py [--threads 2] [--stream-gb 10] [--json FILE]

Vectors are generated: 384 correlated normal coordinates, seed 0; each quantizer is trained on 4,096 of them. Peers, on the
same vectors and as many threads:

- faiss ResidualQuantizer 5x256, 40 bits as 25 trits are, with our beam;
- read + product: the vectors read from a file (in the page cache) into memory, 65,536 at a time, and multiplied by the
  basis in float32. Ours then reads the same file, and encodes.

Last, a stream of ``--stream-gb`` GB is generated and encoded by a process of its own, which reports its peak memory.
"""

import argparse
import multiprocessing
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import torch
from comparison import Comparisons, seconds
from torch import Tensor

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig

DIM = 384
TRAINING_ROWS = 1 << 12
CHUNK_ROWS = 1 << 16
FAISS_ROWS = 1 << 12
MEMORY_GB = 1.5
TRITS = "ternary*25"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stream-gb", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    comparisons = Comparisons(f"encoding {DIM}-d vectors; faiss {faiss.__version__}")
    x_ND = generate(2 * CHUNK_ROWS)
    trits = trained(TRITS, x_ND)
    against_reading(comparisons, trits, x_ND)
    peers = {beam: faiss_residual_quantizer(x_ND, beam) for beam in (1, 5)}
    against_faiss(comparisons, TRITS, trits, x_ND, peers[1], 1)
    for stages in ("onehot:256,ternary*20", "onehot:256*2,ternary*15"):
        quantizer = trained(stages, x_ND)
        for beam, peer in peers.items():
            against_faiss(comparisons, stages, quantizer, x_ND, peer, beam)
    against_faiss(comparisons, TRITS, trits, x_ND, peers[5], 5)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(peak_memory_gb, (arguments.stream_gb, arguments.threads))
    case = f"{TRITS}, a stream of {arguments.stream_gb:g} GB"
    comparisons.add(case, "peak GB of memory", peak, "aim", MEMORY_GB, lower_is_better=True)
    comparisons.finish(arguments.json)


def generate(rows: int, seed: int = 0) -> Tensor:
    """Vectors of falling variance along random axes, off the origin: float32 [rows, DIM]."""
    generator = torch.Generator().manual_seed(seed)
    rotation_DD = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0]
    x_ND = torch.randn(rows, DIM, generator=generator)
    return (x_ND * torch.linspace(2, 0.2, DIM)) @ rotation_DD + 0.2


def trained(stages: str, x_ND: Tensor) -> DPCA:
    dpca = DPCA(DPCAConfig(dim=DIM, stages=parse_stages(stages), iterations=1))
    dpca.fit(x_ND[:TRAINING_ROWS])
    return dpca


def faiss_residual_quantizer(x_ND: Tensor, beam: int) -> Callable[[np.ndarray], np.ndarray]:
    quantizer = faiss.ResidualQuantizer(DIM, 5, 8)
    quantizer.train_type = faiss.ResidualQuantizer.Train_default
    quantizer.max_beam_size = 1
    quantizer.verbose = False
    quantizer.train(x_ND[:TRAINING_ROWS].numpy())
    quantizer.max_beam_size = beam
    return quantizer.compute_codes


def against_reading(comparisons: Comparisons, dpca: DPCA, x_ND: Tensor) -> None:
    basis_RD = dpca.basis_RD.detach()
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file.name, x_ND.numpy())
        ours, reading, product = seconds(
            lambda: [dpca.encode(chunk_ND) for chunk_ND in chunks(file.name)],
            lambda: [chunk_ND @ basis_RD.T for chunk_ND in chunks(file.name)],
            lambda: [chunk_ND @ basis_RD.T for chunk_ND in x_ND.split(CHUNK_ROWS)],
            repeats=7,
        )
        (in_memory,) = seconds(lambda: [dpca.encode(chunk_ND) for chunk_ND in x_ND.split(CHUNK_ROWS)], repeats=7)
    rows = len(x_ND)
    comparisons.add(f"{TRITS}, from a file", "vectors/s", rows / ours, "read + product", rows / reading)
    comparisons.add(f"{TRITS}, in memory", "vectors/s", rows / in_memory, "product alone", rows / product)


def chunks(path: str) -> Iterator[Tensor]:
    """The file's vectors, each chunk read into the same memory."""
    file = np.load(path, mmap_mode="r")
    chunk_ND = torch.empty(CHUNK_ROWS, DIM)
    for first in range(0, len(file), CHUNK_ROWS):
        chunk_ND.numpy()[:] = file[first : first + CHUNK_ROWS]
        yield chunk_ND


def against_faiss(
    comparisons: Comparisons, stages: str, dpca: DPCA, x_ND: Tensor, peer: Callable[[np.ndarray], np.ndarray], beam: int
) -> None:
    rows = CHUNK_ROWS if beam == 1 else FAISS_ROWS
    ours, theirs = seconds(
        lambda: dpca.encode(x_ND[:rows], beam=beam), lambda: peer(x_ND[:FAISS_ROWS].numpy()), repeats=3
    )
    comparisons.add(
        f"{stages}, beam {beam}", "vectors/s", rows / ours, f"faiss RQ 5x256, beam {beam}", FAISS_ROWS / theirs
    )


def peak_memory_gb(stream_gb: float, threads: int) -> float:
    """The most memory this process holds while it encodes a stream, as a job would."""
    torch.set_num_threads(threads)
    dpca = trained(TRITS, generate(TRAINING_ROWS))
    chunk_ND, generator = torch.empty(CHUNK_ROWS, DIM), torch.Generator().manual_seed(1)
    for _ in range(round(stream_gb * 1e9 / (4 * DIM * CHUNK_ROWS))):
        dpca.encode(chunk_ND.normal_(generator=generator))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
