"""Linear probe: how well features learned on a set tell the classes of other data apart.

A student pretrained on the set is frozen; on its features h(x) of the target's training images, each brought to mean 0
and deviation 1, a multinomial logistic regression is fitted,

    min_W,b  mean CE(W h(x) + b, y) + |W|^2 / (2 n),

and its share of right answers on the target's test images is the accuracy (the protocol of pretraining coresets: Kim
et al., "Coreset Sampling from Open-Set for Fine-Grained Self-Supervised Learning", CVPR 2023, section 4). The penalty
is fixed (scikit-learn's C = 1): nothing is chosen on test data.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from distill.contracts import Preprocessing, Source, Split
from distill.evaluation.tested import refuse_one_class
from distill.models import build
from distill.models.base import Classifier
from distill.training.batches import DeviceImages
from distill.training.config import Strict
from distill.training.job import Pool

_BLOCK = 1000  # images a forward pass
_ITERATIONS = 1000


class Probe:
    """Fits and tests a linear classifier on a student's features of the target.

    Args:
        source: with a target, whose train and test splits are read.
        preprocessing: how images reach students.
        device: where students compute; the regression is fitted on the host in float64.

    Raises:
        InputError: the source has one class, from which students learn nothing, or the target one.
    """

    def __init__(self, source: Source, preprocessing: Preprocessing, device: torch.device) -> None:
        assert source.target is not None, "refused before the first step"
        refuse_one_class(source)
        self.target = source.target
        self.classes = len(source.classes)
        self.preprocessing = preprocessing
        self.device = device

    @property
    def identity(self) -> str:
        """What an accuracy was measured on."""
        return f"probe of {self.target.train.fingerprint} on {self.target.test.fingerprint}"

    def accuracy(self, model: Strict, state: Mapping[str, Tensor]) -> float:
        """Share of the target's test images that the probe on this student tells rightly.

        Args:
            model: the student's configuration.
            state: its trained weights, on the host.
        """
        module = build(model, image_shape=self.target.image_shape, classes=self.classes, seed=0)
        module.load_state_dict(dict(state))
        module.to(self.device).eval()
        train, test = (self._features(module, split) for split in (self.target.train, self.target.test))
        mean, deviation = train.mean(axis=0), train.std(axis=0)
        deviation[deviation == 0] = 1.0
        probe = LogisticRegression(max_iter=_ITERATIONS)
        probe.fit((train - mean) / deviation, self.target.train.labels.numpy())
        right = probe.predict((test - mean) / deviation) == self.target.test.labels.numpy()
        return float(right.mean())

    @torch.no_grad()
    def _features(self, module: Classifier, split: Split) -> np.ndarray:
        """float64 (N, D)."""
        images = DeviceImages(Pool(split.images, split.labels, self.preprocessing), self.device)
        return torch.cat([module.features(block).double().cpu() for block in images.blocks(_BLOCK)]).numpy()
