"""Exact search for the documents with the largest inner products, beside FAISS's flat index, as JSON.

    pip install faiss-cpu
    PYTHONPATH=. python benchmarks/retrieval_search.py

Both search the same random fp32 vectors in memory, in one process, in turns; the median of the rounds counts. Without
FAISS its columns are null.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from typing import Any

import numpy as np

from magma_jax.retrieval.search import ExactIndex, FaissIndex, Index, recall_at


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000, help="default %(default)s")
    parser.add_argument("--width", type=int, default=512, help="default %(default)s")
    parser.add_argument("--queries", type=int, default=64, help="default %(default)s")
    parser.add_argument("-k", type=int, default=10, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((arguments.documents, arguments.width), np.float32)
    queries = rng.standard_normal((arguments.queries, arguments.width), np.float32)
    row: dict[str, Any] = vars(arguments) | {"vectors_gib": round(vectors.nbytes / 2**30, 2)}

    indexes: dict[str, Index] = {}
    for name, create in {
        "exact": ExactIndex,
        "approx": lambda vectors: ExactIndex(vectors, method="approx"),
        "faiss": FaissIndex,
    }.items():
        before, start = _peak(), time.perf_counter()
        try:
            indexes[name] = create(vectors)
            found = indexes[name].search(queries, arguments.k)  # compiles, and places the vectors
        except ValueError as error:
            print(error, file=sys.stderr)
            row |= {f"{name}_seconds": None}
            continue
        row[f"{name}_first_seconds"] = round(time.perf_counter() - start, 2)
        row[f"{name}_added_peak_gib"] = round((_peak() - before) / 2**30, 2)
        row[f"{name}_recall"] = recall_at(found.rows, indexes["exact"].search(queries, arguments.k).rows)
    times: dict[str, list[float]] = {name: [] for name in indexes}
    for _ in range(arguments.rounds):
        for name, index in indexes.items():
            start = time.perf_counter()
            index.search(queries, arguments.k)
            times[name].append(time.perf_counter() - start)
    row |= {f"{name}_seconds": round(statistics.median(found), 3) for name, found in times.items()}
    if "faiss" in indexes:
        row["exact_to_faiss"] = round(row["exact_seconds"] / row["faiss_seconds"], 2)
    print(json.dumps(row, indent=2))
    return 0


def _peak() -> int:
    """Largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
