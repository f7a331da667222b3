"""One small evaluation with round numbers, which every test of the report reads."""

from __future__ import annotations

import pytest

from distill.evaluation.results import ArmResult, Evaluation, PairedDifference, SetBytes, StageCost


@pytest.fixture
def evaluation() -> Evaluation:
    """10 images per class of 10 classes: the set beats random, and full data beat both."""
    ours = ArmResult("set", "soft", "convnet", (0.82, 0.83, 0.84), epochs=300, steps=300, images=100)
    random = ArmResult("random", "hard", "convnet", (0.70, 0.72, 0.74), epochs=300, steps=300, images=100)
    full = ArmResult("full", "hard", "convnet", (0.97, 0.97, 0.97), epochs=52, steps=312, images=1437)
    return Evaluation(
        results=(ours, random, full),
        paired=(PairedDifference.between(ours, random), PairedDifference.between(ours, full)),
        bytes=SetBytes(images=6400, labels=2000, aux=600),
        cost={
            "data": StageCost(0.25, None),
            "1 soft_label": StageCost(12.34, 512_000_000, cached=True),
            "evaluate": StageCost(1234.5, 1_500_000_000),
        },
        recipe={
            "seed": 0,
            "data": {"name": "digits"},
            "steps": [{"kcenter": {"ipc": 10}}, {"soft_label": {}}],
        },
        environment={"device": "cpu", "versions": {"torch": "2.10"}},
        notes=(
            "1437 of 1797 images train, 360 test; this note is long enough that a terminal has to wrap it",
        ),
        images_per_class=(10,) * 10,
    )
