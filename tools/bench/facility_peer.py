"""The peer's half of facility.py: runs in an environment that has apricot-select, and not distill.

    python facility_peer.py FOLDER COUNT THREADS

Reads FOLDER/features.npy, float32 (n, D), rows of length 1, then one request a line from stdin, and answers each with
the seconds it took: `whole` (similarities and lazy greedy; the picks go to FOLDER/ranking.npy), `compile` (lazy greedy
on 64 points, where nothing else takes time: apricot compiles its kernels at every fit).
"""

import os
import sys
import time
from pathlib import Path


def select(features: "numpy.ndarray", count: int) -> "numpy.ndarray":
    """Picks of lazy greedy. The product in float32 is faster than the package's own, which wants float64 after it."""
    products = features @ features.T
    similarity = numpy.maximum(products, 0, out=products).astype(numpy.float64)
    selection = FacilityLocationSelection(count, metric="precomputed", optimizer="lazy")
    return selection.fit(similarity).ranking


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    features = numpy.load(folder / "features.npy")
    select(features[:64], 2)
    for line in sys.stdin:
        start = time.perf_counter()
        if line.strip() == "whole":
            ranking = select(features, count)
            seconds = time.perf_counter() - start
            numpy.save(folder / "ranking.npy", ranking)
        else:
            select(features[:64], 2)
            seconds = time.perf_counter() - start
        print(seconds, flush=True)


if __name__ == "__main__":
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = sys.argv[3]  # read when the libraries are imported
    import numpy
    from apricot import FacilityLocationSelection

    main()
