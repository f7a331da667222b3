"""The peer's half of importance.py: runs in an environment that has data-selection, and not distill.

    python importance_peer.py SAMPLE TARGET WORKERS COUNT WORK

Answers each line of stdin with the seconds it took: `fit` (counts the whole of both: the default counts up to 100,000
n-grams a bucket, far more than a sample has), `weigh`, `resample` (which also writes the COUNT documents). SAMPLE has a
file of JSON lines for each of WORKERS processes, so that each reads what it works on and no more; WORK is a folder.
"""

import sys
import time
from pathlib import Path

from data_selection import HashedNgramDSIR


def main() -> None:
    sample, target, workers, count, work = sys.argv[1:]
    files = sorted(map(str, Path(sample).iterdir()))
    model = None
    for number, line in enumerate(sys.stdin):
        start = time.perf_counter()
        if line.strip() == "fit":
            model = HashedNgramDSIR(files, [target], f"{work}/{number}", num_proc=int(workers))
            model.fit_importance_estimator()
        elif line.strip() == "weigh":
            model.compute_importance_weights()
        else:
            model.resample(f"{work}/chosen-{number}", int(count), cache_dir=f"{work}/parts-{number}")
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
