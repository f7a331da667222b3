"""Region calibration: which views are dropped, which get softened hard labels."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from distill.labels.calibration import Calibration


def logits_of_certainty(p: float, classes: int = 5, best: int = 2) -> torch.Tensor:
    row = torch.full((classes,), math.log((1 - p) / (classes - 1)))
    row[best] = math.log(p)
    return row


def test_each_view_by_its_certainty() -> None:
    how = Calibration(hopeless=0.25, uncertain=0.5, trivial=0.9, smoothing=0.2)
    rows = [logits_of_certainty(p) for p in (0.22, 0.3, 0.7, 0.95)]
    logits, kept = how.apply(torch.stack(rows), torch.tensor([0, 1, 2, 3]), temperature=4.0)
    assert kept.tolist() == [False, True, True, False]
    softened = (logits[1] / 4).softmax(dim=0)
    torch.testing.assert_close(softened, torch.tensor([0.05, 0.8, 0.05, 0.05, 0.05]), rtol=2e-3, atol=1e-4)
    assert torch.equal(logits[2], rows[2])


def test_thresholds_rise() -> None:
    with pytest.raises(ValidationError, match="thresholds must rise"):
        Calibration(hopeless=0.5, uncertain=0.3)
