"""Low-rank updates of a network's layers, which are all that is stored of it.

The weight of a layer as a matrix, W (rows, columns), becomes W + B A with B (rows, r) and A (r, columns): LoRA (Hu et
al., ICLR 2022, eq. 3) without its factor alpha / r, which a learning rate makes up for. The matrix of a convolution is
(out, in / groups * k * k), as in HeLlO (ICCV 2025). B begins at 0, so that the network begins as it was, and A is drawn
from N(0, 1 / columns). Where A is not learned (LoRA-FA, Zhang et al., 2023) it follows from the seed and is not stored.

Adapters stand on `nn.Conv2d` and `nn.Linear`. The matrix `in_proj_weight` of `nn.MultiheadAttention` is neither, and
stays as it is; its `out_proj` is a linear layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill.cache.layer_patterns import as_patterns, matching, nearest_pattern
from distill.errors import DamagedDataError, InputError, NonFiniteError, missing_extra
from distill.randomness import counter_uniform, derive_seed

# Stands before the names of what is stored besides the adapters' matrices.
_EXTRA = "extra/"
# Tells the seed of A in the stored metadata, where A is not stored.
_SEED = "down_seed"


@dataclass(frozen=True)
class Ranks:
    """How large the adapters are, and where they stand.

    Args:
        conv, linear: r of convolutions and of linear layers; 0 for no adapters there. A layer's r is cut where what is
            stored would hold no less numbers than W, but never below 1: r (rows + columns) < rows * columns where A is
            learned, r < columns where it is not. `ranks_of` tells what is left of it.
        layers: glob patterns; a layer counts where one of them fits its name (`body.conv1`) or that of a module that
            holds it (`body`).
        learn_down: whether A is learned and stored, or stays as drawn.
    """

    conv: int
    linear: int
    layers: tuple[str, ...] = ("*",)
    learn_down: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_patterns(self.layers))
        for name in ("conv", "linear"):
            rank = getattr(self, name)
            if type(rank) is not int or rank < 0:
                raise InputError(
                    "a rank is a whole number", where=name, found=repr(rank), allowed="0 or more"
                )

    def of(self, layer: nn.Module) -> int:
        """r of a layer of this kind, before it is cut."""
        if isinstance(layer, nn.Conv2d):
            return self.conv
        return self.linear if isinstance(layer, nn.Linear) else 0


class LowRank(nn.Module):
    """W -> W + B A, where W is the weight of a layer, (rows, ...).

    Args:
        weight: W.
        rank: r, cut as `Ranks` says.
        seed, layer: A follows from them.
        learn_down: whether A is a parameter.
    """

    def __init__(self, weight: Tensor, *, rank: int, seed: int, layer: str, learn_down: bool) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        rank = min(rank, _most(rows, columns, learn_down=learn_down))
        down = _drawn(derive_seed(seed, "adapter", layer), rank, columns).to(weight)
        self.seed = None if learn_down else seed
        if learn_down:
            self.A = nn.Parameter(down)
        else:
            self.register_buffer("A", down, persistent=False)
        self.B = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.A).view_as(weight)


def attach(module: nn.Module, ranks: Ranks, *, seed: int) -> None:
    """Freeze the network and give an adapter to every layer that `ranks` names, in place.

    Args:
        module: a network without adapters.
        ranks: which layers, and how large; `ranks_of` tells where a rank was cut.
        seed: A of each layer follows from it and the layer's name, on every device alike.

    Raises:
        InputError: a pattern that fits no layer that could have an adapter.
    """
    assert not _adapters(module), "the network has adapters already"
    layers = {name: part for name, part in module.named_modules() if ranks.of(part) > 0}
    chosen = _selected(list(layers), ranks.layers)
    module.requires_grad_(False)
    for name in chosen:
        layer = layers[name]
        own = LowRank(
            layer.weight.detach(),
            rank=ranks.of(layer),
            seed=seed,
            layer=name,
            learn_down=ranks.learn_down,
        )
        parametrize.register_parametrization(layer, "weight", own)


def ranks_of(module: nn.Module) -> dict[str, int]:
    """r of every adapter by the name of its layer, in the network's order; less than was asked for where it was cut."""
    return {layer: adapter.B.shape[1] for layer, adapter in _adapters(module).items()}


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """What is trained: the matrices of all adapters, layer by layer."""
    return [own for adapter in _adapters(module).values() for own in adapter.parameters()]


def pack(module: nn.Module, *, about: Mapping[str, str], extra: Mapping[str, Tensor] | None = None) -> bytes:
    """The adapters as safetensors bytes, numbers as float16; equal input gives equal bytes.

    Args:
        module: a network with adapters.
        about: what they belong to, such as the encoder's name and sha256; `unpack` compares it.
        extra: tensors of the caller to be stored with them.

    Raises:
        NonFiniteError: a number that is NaN or infinite, or too large for float16.
    """
    matrices = _matrices(module)
    named = {**matrices, **{_EXTRA + name: value for name, value in (extra or {}).items()}}
    arrays = {name: value.detach().cpu().to(torch.float16).numpy() for name, value in named.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise NonFiniteError(
                "an adapter holds a number that float16 cannot",
                where=name,
                found="NaN or a magnitude above 65504",
                fix="lower the learning rate with which the adapters are trained",
            )
    return _with_sorted_header(_safetensors().numpy.save(arrays, metadata=_told(module, about)))


def unpack(module: nn.Module, data: bytes, *, about: Mapping[str, str]) -> dict[str, Tensor]:
    """Put packed matrices into the adapters of a network, and give back the extra tensors, float32 on the CPU.

    Args:
        module: a network to which adapters of the same ranks and seed are attached.
        data: what `pack` made.
        about: what the adapters must belong to.

    Raises:
        DamagedDataError: bytes that are not float16 numbers in the safetensors format, metadata that are no texts, or
            numbers that are not finite.
        InputError: adapters for something else than `about` says, or for layers of other names or shapes.
    """
    arrays = _read(data)
    _refuse_other_facts(_metadata(data), _told(module, about))
    matrices = _matrices(module)
    extra = {name.removeprefix(_EXTRA): value for name, value in arrays.items() if name.startswith(_EXTRA)}
    own = {name: value for name, value in arrays.items() if not name.startswith(_EXTRA)}
    _refuse_other_layers(own, matrices)
    with torch.no_grad():
        for name, matrix in matrices.items():
            matrix.copy_(own[name])
    return extra


def merge(module: nn.Module) -> None:
    """Fold every adapter into the weight it stands on, and take it away, in place."""
    for name in _adapters(module):
        parametrize.remove_parametrizations(module.get_submodule(name), "weight")


def _most(rows: int, columns: int, *, learn_down: bool) -> int:
    """The largest r with which less is stored than W (rows, columns), at least 1."""
    largest = (rows * columns - 1) // (rows + columns) if learn_down else columns - 1
    return max(1, largest)


def _drawn(seed: int, rank: int, columns: int) -> Tensor:
    """float32 (r, columns) of N(0, 1 / columns), by counters.

    Box and Muller (1958), in float64: machines whose logarithms differ in the last bit then still agree once rounded.
    """
    index = torch.arange(rank * columns)
    radius = (-2 * torch.log1p(-counter_uniform(seed, 0, index, 0).double())).sqrt()
    angle = 2 * math.pi * counter_uniform(seed, 0, index, 1).double()
    return (radius * angle.cos() / math.sqrt(columns)).float().view(rank, columns)


def _adapters(module: nn.Module) -> dict[str, LowRank]:
    """By the name of the layer that they stand on."""
    return {
        name: part.parametrizations["weight"][0]
        for name, part in module.named_modules()
        if parametrize.is_parametrized(part, "weight")
        and isinstance(part.parametrizations["weight"][0], LowRank)
    }


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """What is stored of all adapters: body.conv1.A, body.conv1.B, ..."""
    return {
        f"{layer}.{name}".removeprefix("."): matrix
        for layer, adapter in _adapters(module).items()
        for name, matrix in adapter.named_parameters()
    }


def _selected(layers: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The layers that patterns select, in the network's order."""
    chosen = matching(layers, patterns, refused=_fits_nothing)
    if not chosen:
        raise InputError(
            "no layers are named", where="layers", found="()", fix='leave layers out for all: ("*",)'
        )
    return chosen


def _fits_nothing(pattern: str, layers: Sequence[str]) -> InputError:
    if not layers:
        return InputError(
            "the network has no layer of a kind with a rank above 0",
            where="layers",
            found=pattern,
            fix="raise the rank of its kind of layers, convolutions or linear ones, to 1 or more",
        )
    close = nearest_pattern(pattern, layers)
    shown = ", ".join(layers[:8]) + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")
    return InputError(
        f"no layer that could have an adapter fits the pattern {pattern!r}",
        where="layers",
        found=pattern,
        allowed=f"patterns for {shown}, or for the modules that hold them",
        fix=f"did you mean {close!r}?" if close else None,
    )


def _told(module: nn.Module, about: Mapping[str, str]) -> dict[str, str]:
    """`about`, and the seed of matrices that are not stored."""
    assert _SEED not in about
    seed = next((str(each.seed) for each in _adapters(module).values() if each.seed is not None), None)
    return {**about, **({} if seed is None else {_SEED: seed})}


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise missing_extra("safetensors", "weights", purpose="storing adapters") from None
    return safetensors


def _header(data: bytes) -> dict[str, Any]:
    """The header of valid safetensors bytes: its length as 8 bytes, little-endian, then JSON."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _metadata(data: bytes) -> dict[str, str]:
    """Of valid safetensors bytes; the library takes some of what is no mapping of texts for none at all."""
    found = _header(data).get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DamagedDataError(
            "an adapter does not say what it belongs to",
            where="__metadata__",
            found=json.dumps(found)[:80],
            allowed="a mapping of texts",
            fix="get the set again",
        )
    return found


def _with_sorted_header(data: bytes) -> bytes:
    """The same tensors and metadata: the library writes the keys of metadata in another order in every process."""
    numbers = data[8 + int.from_bytes(data[:8], "little") :]
    header = json.dumps(_header(data), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + numbers


def _read(data: bytes) -> dict[str, Tensor]:
    """float32 tensors by name, finite."""
    library = _safetensors()
    try:
        stored = library.deserialize(data)
    except library.SafetensorError as error:
        raise DamagedDataError("an adapter is not in the safetensors format", found=str(error)) from error
    tensors = {}
    for name, spec in stored:
        if spec["dtype"] != "F16":
            raise DamagedDataError(
                "an adapter has numbers of another kind", where=name, found=spec["dtype"], allowed="F16"
            )
        array = np.frombuffer(spec["data"], dtype="<f2").astype(np.float32).reshape(spec["shape"])
        if not np.isfinite(array).all():
            raise DamagedDataError("an adapter holds NaN or infinite numbers", where=name)
        tensors[name] = torch.from_numpy(array)
    return tensors


def _refuse_other_facts(found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise InputError(
                "the adapter belongs to something else",
                where=key,
                found=found.get(key, "nothing"),
                allowed=wanted.get(key, "nothing"),
                fix="use the adapter with what it was made for",
            )


def _refuse_other_layers(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    wrong = [
        *(f"{name} is missing" for name in wanted if name not in found),
        *(f"{name} is unknown" for name in sorted(found) if name not in wanted),
        *(
            f"{name} is {tuple(found[name].shape)} instead of {tuple(matrix.shape)}"
            for name, matrix in wanted.items()
            if name in found and found[name].shape != matrix.shape
        ),
    ]
    if wrong:
        raise InputError(
            "an adapter for another encoder",
            found="; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""),
            fix="attach adapters of the ranks and layers that it was made with, to the encoder it was made for",
        )
