"""What a teacher thinks of images: cross-entropy to their classes, and the distance of their statistics.

For a group of images of classes y, teachers f_m and weights w_m (Yin et al., "Squeeze, Recover and Relabel", NeurIPS
2023, for one; Cui et al., "Dataset Distillation via Committee Voting", 2025, for several),

    L = sum_m w_m ( mean CE(f_m(x), y) + r R_m(x) ),

where w_m multiplies both terms and R_m (distill/recovery/statistics.py) is not made comparable between networks, as in
the released code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.cache.networks import Network
from distill.contracts import Preprocessing
from distill.labels.ensemble import between
from distill.recovery.statistics import Targets, distance, listen
from distill.recovery.winograd import with_small_maps


class Judge:
    """One teacher on a device, ready to judge.

    Args:
        network: the teacher.
        name: for messages.
        preprocessing: of the images that it is shown.
        device: where.
        statistics: r.
        classwise: mean and variance (C, D) of each batch norm's input by class; None: the running statistics.
    """

    def __init__(
        self,
        network: Network,
        name: str,
        *,
        preprocessing: Preprocessing,
        device: torch.device,
        statistics: float,
        classwise: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.name = name
        self.module = network.module(device)
        self.way = between(preprocessing, network.preprocessing, device)
        self.statistics = statistics
        self.heard, targets = listen(self.module)
        with_small_maps(self.module)
        self.targets: Targets = targets if classwise is None else {key: classwise[key] for key in targets}
        self.classwise = classwise is not None

    def loss(self, images: Tensor, labels: Tensor, *, groups: int) -> Tensor:
        """L of each group for this teacher alone, float32 (G,).

        Args:
            images: (G * B, Ch, H, W), group by group.
            labels: int64 (G * B,); of one class a group, where the statistics are those of classes.
            groups: G.
        """
        self.heard.groups = groups
        logits = self.module(self.way(images))
        entropy = F.cross_entropy(logits.float(), labels, reduction="none").view(groups, -1).mean(dim=1)
        if self.statistics == 0:
            return entropy
        targets = self.targets
        if self.classwise:
            own = labels.view(groups, -1)[:, 0]
            targets = {name: (mean[own], var[own]) for name, (mean, var) in targets.items()}
        return entropy + self.statistics * distance(self.heard, targets)
