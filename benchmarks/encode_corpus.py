"""What ``sidrec encode-corpus`` costs, against the same encoding in float64 alone, and against doing no more than reading.

    python benchmarks/encode_corpus.py [--items 1000000] [--threads 1] [--json FILE]

A synthetic corpus of two sources, 64 and 48 wide, is made, and a tokenizer of default sizes trained on it for one epoch. Then
each of these runs as a process of its own, whose CPU time and peak memory are taken whole, imports included:

- the job, with a short report and with a full one;
- float64: the same items, read and encoded in float64 throughout, as the digits are defined (no float32 filter, no report);
- reading: the sources' columns, decoded by Arrow and dropped, which no encoder can do without.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from comparison import Comparisons

FLOAT64 = """
import sys, torch
from pathlib import Path
from sidrec_torchrec.fusion.encoder import encoding_part
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.tokenizer import Tokenizer
data, tokenizer = map(Path, sys.argv[1:3])
tokenizer = Tokenizer.load(tokenizer)
exact = encoding_part(tokenizer.model).double()
with torch.no_grad():
    for _, items in ItemStream.open(data, tuple(tokenizer.model.config.read_sources), {}).blocks():
        tokenizer.codec.spec.pack(exact.quantizer.encode(exact.latent(items)))
"""
READING = """
import sys, pyarrow.parquet as pq
from pathlib import Path
with pq.ParquetFile(Path(sys.argv[1]) / "items.parquet", pre_buffer=False) as file:
    for batch in file.iter_batches(8192, columns=["item_id", "text_emb", "image_emb"], use_threads=False):
        pass
"""
MEASURE = """
import json, resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    sidrec = [sys.executable, "-m", "sidrec_torchrec.cli"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, tokenizer = str(folder / "data"), str(folder / "tokenizer")
        subprocess.run(
            [*sidrec, "data", "synthetic", f"--items={arguments.items}", "--users=20", f"--out={data}"], check=True
        )
        train = ["--epochs=1", "--batch-size=4096", f"--data={data}", f"--out={tokenizer}"]
        subprocess.run([*sidrec, "train-tokenizer", *train], check=True)
        job = [*sidrec, "encode-corpus", f"--data={data}", f"--tokenizer={tokenizer}"]
        short = measure(*job, f"--out={folder / 'short'}")
        full = measure(*job, f"--out={folder / 'full'}", "--report=full")
        float64 = measure(sys.executable, "-c", FLOAT64, data, tokenizer)
        reading = measure(sys.executable, "-c", READING, data)
    results = Comparisons(f"encode-corpus, {arguments.items:,} items of two sources")
    for case, (cpu, memory) in {"short report": short, "full report": full}.items():
        for peer, (its_cpu, its_memory) in {"float64 alone": float64, "reading alone": reading}.items():
            results.add(case, "CPU seconds", cpu, peer, its_cpu, lower_is_better=True)
            results.add(case, "peak GiB", memory, peer, its_memory, lower_is_better=True)
        results.add(case, "items/CPU s", arguments.items / cpu, "float64 alone", arguments.items / float64[0])
    results.finish(arguments.json)


def measure(*command: str) -> tuple[float, float]:
    """CPU seconds and peak GiB of a command, with all it starts."""
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], check=True, capture_output=True, text=True
    ).stdout
    cpu, memory = json.loads(output)
    return cpu, memory


if __name__ == "__main__":
    main()
