"""What a teacher thinks of images: cross-entropy to their classes, and the distance of their statistics.

For a group of images of classes y, a teacher f and weights w (Yin et al., NeurIPS 2023, equation 7; Cui et al.,
"Dataset Distillation via Committee Voting", 2025, for several teachers),

    L = sum_m w_m ( mean CE(f_m(x), y) + r R_m(x) ),

where w_m multiplies both terms and R_m is not made comparable between networks, as in the released code. The sum runs
over all teachers in every step, or over one teacher a step, in turn (`turns`: Cui et al., FADRM, NeurIPS 2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.cache.networks import Network
from distill.recovery.statistics import distance, listen, targets_of


class Judge:
    """One teacher on a device, ready to judge.

    Args:
        network: the teacher.
        device: where.
        statistics: r, the weight of R.
        classwise: mean and variance (C, D) of each layer's input by class, None for those of the running statistics.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        *,
        statistics: float,
        classwise: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.module = network.module(device)
        self.weight = statistics
        self.targets = targets_of(self.module) if classwise is None else list(classwise)
        self.classwise = classwise is not None
        self.moments = listen(self.module)

    def loss(self, images: Tensor, labels: Tensor, *, groups: int) -> Tensor:
        """L of each group, float32 (G,).

        Args:
            images: (G * B, Ch, H, W), group by group.
            labels: int64 (G * B,); of one class a group, where statistics are those of classes.
            groups: G.
        """
        self.moments.groups = groups
        self.moments.found.clear()
        logits = self.module(images)
        entropy = F.cross_entropy(logits.float(), labels, reduction="none").view(groups, -1).mean(dim=1)
        if self.weight == 0:
            return entropy
        targets = self.targets
        if self.classwise:
            own = labels.view(groups, -1)[:, 0]
            targets = [(mean[own], var[own]) for mean, var in targets]
        return entropy + self.weight * distance(self.moments, targets)
