"""What can be asked of the cache about every sample of a split: `cache.request(split, network, [Features(), Loss()])`.

Some of it is stored (features, logits, critical maps, projected gradients, gradient norms, statistics); the rest
follows from what is stored, or from what was recorded while the network was trained, and is computed as it is read.

An image whose values are NaN or infinite (the cache refuses more than a few) has a row of zeros in features, logits,
maps and gradients. In scores (losses, margins, lengths) it is NaN: any number would be a rank among the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from distill.cache.gradient_request import GradientRequest, Output, refuse_other
from distill.cache.layer_patterns import as_patterns
from distill.cache.projections import Projection
from distill.cache.taps import PENULTIMATE

LayerKind = Literal["batch_norm", "convolution"]


@dataclass(frozen=True)
class Features:
    """Outputs of a layer, flattened: float32 (N, D). `penultimate` is the classifier's input."""

    layer: str = PENULTIMATE

    kind = "features"


@dataclass(frozen=True)
class Logits:
    """float32 (N, C)."""

    kind = "logits"


@dataclass(frozen=True)
class CriticalMaps:
    """Where on each image the logit of its class rests: flattened, float32 (N, h * w), 0 or more.

    `distill.cache.critical_maps` has the formula, and `map_layer` there says what h and w are.
    """

    kind = "critical_maps"


@dataclass(frozen=True)
class Loss:
    """Cross-entropy, (N, 1)."""


@dataclass(frozen=True)
class Margins:
    """Logit of the label minus the greatest other, (N, 1)."""


@dataclass(frozen=True)
class ErrorNorms:
    """EL2N: the length of softmax(logits) - onehot(label), (N, 1); average it over networks."""


@dataclass(frozen=True)
class LastLayerGradients:
    """The cross-entropy's gradient by the last layer's weights and bias, in closed form: (N, C * (D + 1))."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of every sample by the network's parameters, projected to k dimensions: float32 (N, k).

    Args:
        projection: how; its `dim` is k.
        layers: patterns of the parameters that count, such as ("body.*",).
        of: the cross-entropy, or TRAK's margin z_y - logsumexp of the other logits.
    """

    projection: Projection = Projection()  # noqa: RUF009 - frozen
    layers: tuple[str, ...] = ("*",)
    of: Output = "loss"

    kind = "gradients"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self.request.layers)  # checked, a tuple

    @property
    def request(self) -> GradientRequest:
        return GradientRequest(layers=self.layers, of=self.of, projection=self.projection)


@dataclass(frozen=True)
class GradientNorms:
    """GraNd: the length of the gradient by the network's parameters, (N, 1); average it over networks.

    Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021, definition 2.1.
    """

    layers: tuple[str, ...] = ("*",)
    of: Output = "loss"

    kind = "gradient_norms"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self.request.layers)  # checked, a tuple

    @property
    def request(self) -> GradientRequest:
        return GradientRequest(layers=self.layers, of=self.of, projection=None)


@dataclass(frozen=True)
class Statistics:
    """Mean and variance of each channel of the inputs of layers, over all samples or for each class.

    Args:
        of: inputs of batch norms, or of convolutions.
        layers: patterns of the layers' names.
        per_class: whether each class has its own.
    """

    of: LayerKind = "batch_norm"
    layers: tuple[str, ...] = ("*",)
    per_class: bool = False

    kind = "statistics"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_patterns(self.layers))
        refuse_other(self.of, get_args(LayerKind))


@dataclass(frozen=True)
class Forgetting:
    """How often a sample went from right to wrong while the network was trained, (N, 1); inf if it was never right.

    Toneva et al., "An Empirical Study of Example Forgetting", ICLR 2019, section 3.
    """


@dataclass(frozen=True)
class AreaUnderMargin:
    """Mean over the epochs of training of the sample's margin, (N, 1).

    Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", NeurIPS 2020, eq. 2.
    """


Stored = Features | Logits | CriticalMaps | Gradients | GradientNorms
Scored = Loss | Margins | ErrorNorms
Derived = Scored | LastLayerGradients
Recorded = Forgetting | AreaUnderMargin
Quantity = Stored | Derived | Recorded | Statistics


def parts_of(quantity: Stored | Statistics) -> dict[str, Any]:
    """What decides the values beside data and network; JSON-able."""
    if isinstance(quantity, Features):
        return {"layer": quantity.layer}
    if isinstance(quantity, Logits | CriticalMaps):
        return {}
    if isinstance(quantity, Statistics):
        return {"of": quantity.of, "layers": list(quantity.layers), "per_class": quantity.per_class}
    parts: dict[str, Any] = {"of": quantity.of, "layers": list(quantity.layers)}
    if isinstance(quantity, Gradients):
        parts["projection"] = quantity.projection.model_dump(mode="json")
    return parts
