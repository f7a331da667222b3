"""Per-sample gradients of any network: torch.func's grad of one sample's output, mapped over the block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

# (logits (1, C), labels (1,)) -> (1,).
Output = Callable[[Tensor, Tensor], Tensor]


class FunctionalPass:
    """Gradients by some parameters of a network, one for each sample.

    Args:
        module: in evaluation mode, without anything random.
        names: of the parameters.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.module = module
        own = dict(module.named_parameters())
        self.parameters = {name: own[name].detach() for name in names}

    def run(self, images: Tensor, labels: Tensor, output: Output) -> dict[str, Tensor]:
        """(B, *shape) for each parameter, from images (B, Ch, H, W) and labels int64 (B,)."""

        def of_one(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            logits = functional_call(self.module, parameters, (image[None],))
            return output(logits, label[None]).squeeze(0)

        gradients: Any = vmap(grad(of_one), in_dims=(None, 0, 0), randomness="error")
        with sdpa_kernel(
            SDPBackend.MATH
        ):  # the fused kernels cannot be mapped, and would run sample by sample
            found: dict[str, Tensor] = gradients(self.parameters, images, labels)
        return found
