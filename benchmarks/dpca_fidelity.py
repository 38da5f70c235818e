"""What DPCA keeps of vectors it has not seen, against other quantizers at no more bits, and what encoding costs each.

    python benchmarks/dpca_fidelity.py --items FILE --source NAME [--bits 24 40 62] [--json FILE] [--seed 0]

A quarter of the vectors is the test set. DPCA's stages and beam are chosen by ``codec.design`` on the rest alone (a quarter
of it held out again), then fitted on all of the rest; the same basis is measured with greedy encoding too. Peers: faiss's
ResidualQuantizer with beams 1 and 5, LocalSearchQuantizer and ProductQuantizer, and vector-quantize-pytorch's ResidualVQ,
each with as many codebooks of 8 bits as the bits allow; and its FSQ on as many principal axes as they allow, at the number
of levels that is best on the test set, with a least-squares decoder.

The peers come with ``pip install '.[benchmarks]'``.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from comparison import Comparisons, seconds
from torch import Tensor
from vector_quantize_pytorch import FSQ, ResidualVQ

from sidrec_torchrec.codec.alphabet import format_stages
from sidrec_torchrec.codec.design import DesignConfig, design
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from sidrec_torchrec.jobs.codec_design import CodecDesignConfig, draw

TEST = 0.25
LEVELS = (3, 5, 8)
EPOCHS, BATCH = 20, 512  # of ResidualVQ, beyond its k-means start
TIMED_ROWS = 4096  # the test vectors over and over


@dataclass(frozen=True, eq=False)
class Measured:
    """A quantizer after training: its name, bits, and the test vectors as it gives them back."""

    name: str
    bits: float
    decoded: Tensor
    encode: Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[24, 40, 62])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    config = CodecDesignConfig(items=arguments.items, source=arguments.source, bits=min(arguments.bits))
    x_ND = draw(config)
    x_ND = x_ND[torch.from_numpy(np.random.default_rng(arguments.seed).permutation(len(x_ND)))]
    test = int(len(x_ND) * TEST)
    folder = arguments.items if arguments.items.is_dir() else arguments.items.parent
    comparisons = Comparisons(
        f"{len(x_ND) - test:,} vectors to learn from, {test:,} to test on; seed {arguments.seed}; faiss {faiss.__version__}"
    )
    for bits in arguments.bits:
        case = f"{folder.resolve().name}/{arguments.source}/{bits}"
        compare(comparisons, case, x_ND[test:], x_ND[:test], bits, arguments.seed)
    comparisons.finish(arguments.json)


def compare(comparisons: Comparisons, case: str, x_ND: Tensor, test_ND: Tensor, bits: int, seed: int) -> None:
    """Adds a case: the errors, and the times of encoding."""
    ours = by_dpca(x_ND, test_ND, bits, seed)
    peers = [*by_faiss(x_ND, test_ND, bits), by_residual_vq(x_ND, test_ND, bits, seed), by_fsq(x_ND, test_ND, bits)]
    total = (test_ND - x_ND.mean(0)).double().square().sum()
    errors = {q: float((q.decoded - test_ND).double().square().sum() / total) for q in (*ours, *peers)}
    taken = seconds(*(q.encode for q in errors), repeats=3)
    times = {q: t / TIMED_ROWS * 1e6 for q, t in zip(errors, taken, strict=True)}
    for own in ours:
        print(f"{case}: DPCA {own.name}, {own.bits:.1f} bits: error {errors[own]:.4f}, {times[own]:.0f} us", flush=True)
        for peer in peers:
            how, name = own.name.partition(" ")[2], f"{peer.name}, {peer.bits:.1f} bits"
            comparisons.add(case, f"relative error, {how}", errors[own], name, errors[peer], lower_is_better=True)
            comparisons.add(case, f"us to encode, {how}", times[own], name, times[peer], lower_is_better=True)


def by_dpca(x_ND: Tensor, test_ND: Tensor, bits: int, seed: int) -> list[Measured]:
    """The chosen design and, where it encodes with a beam, the same basis without."""
    held_out = int(len(x_ND) * TEST)
    config = DesignConfig(bits=bits, tolerance=0.0, seed=seed)
    chosen = design(x_ND[held_out:], x_ND[:held_out], config).chosen
    dpca = DPCA(
        DPCAConfig(
            dim=x_ND.shape[1],
            stages=chosen.stages,
            beam=chosen.beam,
            iterations=config.iterations,
            seed=seed,
        )
    )
    dpca.fit(x_ND)
    timed_ND = _timed(test_ND)
    return [
        Measured(
            name=f"{format_stages(chosen.stages)} {f'beam {beam}' if beam > 1 else 'greedy'}",
            bits=chosen.bits,
            decoded=dpca.decode(dpca.encode(test_ND, beam=beam)).detach(),
            encode=lambda beam=beam: dpca.encode(timed_ND, beam=beam),
        )
        for beam in sorted({chosen.beam, 1}, reverse=True)
    ]


def by_faiss(x_ND: Tensor, test_ND: Tensor, bits: int) -> list[Measured]:
    mean_D, dim, books = x_ND.mean(0), x_ND.shape[1], bits // 8
    quantizers = {"faiss LSQ": faiss.LocalSearchQuantizer(dim, books, 8)}
    for beam in (1, 5):
        quantizers[f"faiss RQ beam {beam}"] = faiss.ResidualQuantizer(dim, books, 8)
        quantizers[f"faiss RQ beam {beam}"].max_beam_size = beam
    # product quantization cuts vectors into equal parts: zeros fill the last one
    quantizers["faiss PQ"] = faiss.ProductQuantizer(dim + -dim % books, books, 8)
    measured = []
    for name, quantizer in quantizers.items():
        filled, test = (np.pad((x - mean_D).numpy(), ((0, 0), (0, quantizer.d - dim))) for x in (x_ND, test_ND))
        quantizer.train(filled)
        decoded = torch.from_numpy(quantizer.decode(quantizer.compute_codes(test))[:, :dim]) + mean_D
        timed = _timed(test)
        measured.append(Measured(name, books * 8, decoded, lambda q=quantizer, x=timed: q.compute_codes(x)))
    return measured


def by_residual_vq(x_ND: Tensor, test_ND: Tensor, bits: int, seed: int) -> Measured:
    mean_D = x_ND.mean(0)
    scale = (x_ND - mean_D).square().mean().sqrt()
    vq = ResidualVQ(dim=x_ND.shape[1], num_quantizers=bits // 8, codebook_size=256, kmeans_init=True, kmeans_iters=20)
    vq.train()
    generator = torch.Generator().manual_seed(seed)
    standard_ND, test = (x_ND - mean_D) / scale, (test_ND - mean_D) / scale
    with torch.no_grad():
        vq(standard_ND)  # starts by k-means
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x_ND), generator=generator).split(BATCH):
                vq(standard_ND[rows])
        vq.eval()
        decoded_ND = vq(test)[0] * scale + mean_D
    timed_ND = _timed(test)
    return Measured("ResidualVQ", bits // 8 * 8, decoded_ND, torch.no_grad()(lambda: vq(timed_ND)))


def by_fsq(x_ND: Tensor, test_ND: Tensor, bits: int) -> Measured:
    """The best of a few numbers of levels."""
    found = [_fsq(x_ND, test_ND, bits, levels) for levels in LEVELS]
    return min(found, key=lambda measured: float((measured.decoded - test_ND).square().sum()))


def _fsq(x_ND: Tensor, test_ND: Tensor, bits: int, levels: int) -> Measured:
    digits = int(bits / np.log2(levels))
    mean_D = x_ND.mean(0)
    _, values, axes_MD = torch.linalg.svd(x_ND - mean_D, full_matrices=False)
    to_digits_DM = axes_MD[:digits].T / (values[:digits] / len(x_ND) ** 0.5)
    fsq = FSQ([levels] * digits, return_indices=False)

    def codes(x: Tensor) -> Tensor:
        return fsq(((x - mean_D) @ to_digits_DM).unsqueeze(0))[0].squeeze(0)

    with torch.no_grad():
        decoder_MD = torch.linalg.lstsq(codes(x_ND), x_ND - mean_D).solution
        decoded_ND = codes(test_ND) @ decoder_MD + mean_D
    timed_ND = _timed(test_ND)
    return Measured(
        f"FSQ {levels} levels", digits * np.log2(levels), decoded_ND, torch.no_grad()(lambda: codes(timed_ND))
    )


def _timed(x_ND: Tensor | np.ndarray) -> Tensor | np.ndarray:
    return x_ND[np.arange(TIMED_ROWS) % len(x_ND)]


if __name__ == "__main__":
    main()
