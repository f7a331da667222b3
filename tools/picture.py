"""Draw the images of a set: `python tools/picture.py runs/digits/set.h5 docs/digits.png`.

One row a class; of sets of one image a class, the classes stand side by side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from distill.report.images import fitting_scale, grid_png
from distill.report.write import displayable
from distill.store.reader import read_set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument("--columns", type=int, default=10, help="images a row")
    parser.add_argument("--goal", type=int, default=48, help="side of an image on the picture, px")
    args = parser.parse_args()
    distilled = read_set(args.set)
    images, labels = displayable(distilled.images), distilled.labels.numpy()
    order = np.argsort(labels, kind="stable")
    scale = fitting_scale(*images.shape[1:3], goal=args.goal)
    rows = labels[order]
    if len(np.unique(labels)) == len(labels):
        rows = np.arange(len(labels)) // args.columns
    args.png.write_bytes(grid_png(images[order], rows, columns=args.columns, scale=scale))


if __name__ == "__main__":
    main()
