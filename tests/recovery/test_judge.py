"""One teacher that judges: which images it is shown, and in which precision it hears."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from distill.contracts import Preprocessing
from distill.recovery.objective import Judge
from distill.recovery.statistics import listen
from tests.recovery.test_recover import CPU, PLAIN, begin, network, plain_loss

ROWS = torch.tensor([0, 3, 6])
CLASSES = torch.tensor([0, 1, 2])


def test_a_teacher_judges_images_as_it_was_trained() -> None:
    """Those of the set, normalised by 0.4 and 0.3, are shown to it normalised by its own mean and std."""
    theirs = Preprocessing(mean=(0.1,), std=(0.9,))
    teacher, x = replace(network(0), preprocessing=theirs), begin()[ROWS]
    judge = Judge(teacher, "a", preprocessing=PLAIN, device=CPU, statistics=0.1)
    shown = (x * 0.3 + 0.4 - 0.1) / 0.9
    torch.testing.assert_close(
        judge.loss(x, CLASSES, groups=1), plain_loss(0, shown, CLASSES)[None], rtol=1e-4, atol=1e-4
    )
    assert abs(plain_loss(0, shown, CLASSES) - plain_loss(0, x, CLASSES)) > 0.01


class _Kept(nn.Module):
    """Keeps what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        self.given = x.detach()
        return x


@pytest.mark.parametrize("groups", [1, 2])
def test_statistics_are_float32_under_autocast(groups: int) -> None:
    """Sums of bfloat16 activations with a large mean are lost in bfloat16, which has 8 bits."""
    generator = torch.Generator().manual_seed(0)
    kept = _Kept()
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), kept, nn.BatchNorm2d(4)).eval()
    convolution = module[0]
    for value, scale in ((convolution.weight, 0.3), (convolution.bias, 20.0)):
        value.data = scale * torch.randn(value.shape, generator=generator)
    heard, _ = listen(module)
    heard.groups = groups
    x = torch.randn(2 * groups, 2, 8, 8, generator=generator)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        module(x)
    assert kept.given.dtype == torch.bfloat16
    ((mean, var),) = heard.moments.values()
    assert mean.dtype == var.dtype == torch.float32
    for group, part in enumerate(kept.given.double().chunk(groups)):
        flat = part.transpose(0, 1).flatten(1)
        torch.testing.assert_close(mean[group].double(), flat.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(var[group].double(), flat.var(1, unbiased=False), rtol=1e-4, atol=1e-4)
