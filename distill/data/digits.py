"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: real data that need no download.

The images come as integers 0..16; pixel = (255 * value + 8) // 16, which is 255 / 16 * value rounded to the
nearest (halves up), so 0 stays 0 and 16 becomes 255. They bring no test split: a fifth of each class is cut
off, the same images for every seed.
Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
1998 (the test part of that collection)."""

from __future__ import annotations

from typing import Literal

import torch
from sklearn.datasets import load_digits

from distill.contracts import Progress
from distill.data.base import DEFAULT_TEST, Data, DataConfig, Plan
from distill.data.build import Found, PixelRows

_COUNT = 1797
# Per class round(0.2 * size), summed: what the test cut takes.
_TEST_COUNT = 359


class DigitsConfig(DataConfig):
    name: Literal["digits"] = "digits"


class Digits(Data):
    """scikit-learn's 1,797 real 8x8 digits; needs no download."""

    name = "digits"
    Config = DigitsConfig

    def find(self, progress: Progress) -> Found:
        bunch = load_digits()
        values = torch.from_numpy(bunch.images).to(torch.int64)  # (N, 8, 8), 0..16
        images = ((255 * values + 8) // 16).to(torch.uint8)[:, None]
        labels = torch.from_numpy(bunch.target).to(torch.int64)
        rows = PixelRows(labels, "scikit-learn's digits", images)
        return Found(rows, DEFAULT_TEST, tuple(map(str, bunch.target_names)))

    def peek(self) -> Plan:
        return Plan(classes=10, image_shape=(1, 8, 8), train=_COUNT - _TEST_COUNT, test=_TEST_COUNT)
