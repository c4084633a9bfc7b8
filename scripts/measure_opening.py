"""What opening a corpus costs: `python scripts/measure_opening.py FOLDER [--files 2000] [--index]`.

Makes token files of 500 MB without content (sparse: they take no disk), opens them as `train` does
in a process of its own, and draws batches of 480 windows of 1,024 ids. Prints seconds and the peak
of the process's memory, less what it has after its imports.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from gpt2_jax.training.corpus import open_corpus
from gpt2_jax.training.data import Batches
from gpt2_jax.training.manifest import NAME, Scan, record_of, write_manifest
from gpt2_jax.training.token_files import token_file

FILE_BYTES = 500_000_000


def make(folder: Path, n_files: int, *, with_manifest: bool) -> None:
    """Makes the files, and a manifest whose hashes of all bytes are made up."""
    folder.mkdir(parents=True)
    records = []
    for number in range(n_files):
        path = folder / f"train_{number:05}.bin"
        with path.open("wb") as opened:
            opened.truncate(FILE_BYTES)
        # Opening compares a sample alone: a hash of a terabyte would be of zeros.
        found = Scan(hashlib.sha256(path.name.encode()).hexdigest(), 0)
        records.append(record_of(token_file(path), path.name, found))
    if with_manifest:
        write_manifest(folder / NAME, {"train": records, "val": []})


def peak() -> int:
    """Returns the largest memory that this process had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(folder: Path) -> None:
    """Opens a folder, draws batches, and prints what it took."""
    import gpt2_jax  # noqa: F401  # what `train` has in memory anyway

    before = peak()
    start = time.perf_counter()
    corpus = open_corpus(folder)
    opened = time.perf_counter()
    batches = Batches(corpus.train, batch_size=480, length=1024, seed=0)
    batches(0)
    first = time.perf_counter()
    times = []
    for cursor in range(1, 31):
        begun = time.perf_counter()
        batches(cursor)
        times.append(time.perf_counter() - begun)
    found = {
        "tokens": len(corpus.train),
        "windows": batches.windows_per_epoch,
        "open_seconds": round(opened - start, 3),
        "first_batch_seconds": round(first - opened, 3),
        "batch_milliseconds": round(float(np.median(times)) * 1e3, 1),
        "peak_mib": peak(),
        "peak_mib_of_imports": before,
    }
    print(json.dumps(found))


def main() -> None:
    """Makes a corpus, and measures it in another process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="to make, or with --only, to open")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--manifest", action="store_true", help="write one")
    parser.add_argument("--only", action="store_true", help="measure what is there")
    args = parser.parse_args()
    if args.only:
        measure(args.folder)
        return
    make(args.folder, args.files, with_manifest=args.manifest)
    subprocess.run([sys.executable, __file__, str(args.folder), "--only"], check=True)


if __name__ == "__main__":
    main()
