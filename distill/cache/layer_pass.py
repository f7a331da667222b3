"""Per-sample gradients from one forward and one backward pass: layers are listened to, parameters take no part.

In evaluation samples do not meet, so the gradient of the sum of all samples' outputs by what a layer puts out holds
each sample's own gradient in its row; with the layer's input, `distill.cache.layer_gradients` makes the parameters'
gradients of it, as soon as it arrives. The graph begins at the first layer listened to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.cache.layer_gradients import Gradient, bytes_per_sample, has_closed_form, layer_gradients

_BLOCK_BYTES = 16 << 20  # larger blocks are not faster, and leave the processor's caches

# Logits (B, C) -> (B,).
Output = Callable[[Tensor], Tensor]
# Called with rows of the block, the parameter's name and its gradients for these rows.
Receive = Callable[[slice, str, Gradient], None]


class _Heard:
    """A layer in one pass: what went into its calls, and what came back.

    Args:
        layer: the module.
        prefix: of its parameters' names in the network.
        block_bytes: what a tensor made for its gradients, for some of the samples, may take.
    """

    def __init__(self, layer: nn.Module, prefix: str, *, block_bytes: int) -> None:
        self.layer = layer
        self.prefix = prefix
        self.block_bytes = block_bytes
        self.receive: Receive | None = None
        self._inputs: list[Tensor] = []
        self._grads: dict[int, Tensor] = {}

    def called(self, inputs: Tensor) -> int:
        """Note a call; its number."""
        self._inputs.append(inputs.detach())
        return len(self._inputs) - 1

    def arrived(self, call: int, grad: Tensor) -> None:
        """Note the gradient of what a call put out; the last one sets the layer's own gradients off."""
        self._grads[call] = grad
        if len(self._grads) == len(self._inputs):
            self.flush()

    def flush(self) -> None:
        """Hand on what arrived; a call that the output does not depend on adds nothing."""
        calls = [(self._inputs[call], grad) for call, grad in sorted(self._grads.items())]
        self._grads.clear()
        if calls:
            self._hand_on(calls)

    def _hand_on(self, calls: list[tuple[Tensor, Tensor]]) -> None:
        """Make the layer's gradients for some samples at a time; how many depends on shapes alone."""
        assert self.receive is not None
        rows = max(1, self.block_bytes // max(bytes_per_sample(self.layer, *call) for call in calls))
        for start in range(0, len(calls[0][0]), rows):
            block = slice(start, start + rows)
            part = [(inputs[block], grad[block]) for inputs, grad in calls]
            for name, gradient in layer_gradients(self.layer, part).items():
                self.receive(block, self.prefix + name, gradient)


class LayerPass:
    """Forward and backward through a network, listening to some of its layers.

    Args:
        module: in evaluation mode.
        layers: names of the layers listened to, of those that `layers_with_closed_form` found.
        block_bytes: what a tensor made for the gradients of one layer, for some of the samples, may take; a product
            that is left unformed does not count.
    """

    def __init__(self, module: nn.Module, layers: Collection[str], *, block_bytes: int) -> None:
        self.module = module
        self.layers = tuple(layers)
        self.block_bytes = min(block_bytes, _BLOCK_BYTES)

    def run(self, images: Tensor, wanted: Sequence[tuple[Output, Receive]]) -> Tensor:
        """Logits (B, C), with the bits of a plain forward pass.

        Args:
            images: (B, Ch, H, W).
            wanted: functions from logits (B, C) to (B,), whose gradients are wanted, and where their gradients go.
        """
        anchor = torch.zeros((), dtype=images.dtype, device=images.device, requires_grad=True)
        with _frozen(self.module), torch.enable_grad(), self._listening(anchor) as heard:
            logits: Tensor = self.module(images)
            for number, (output, receive) in enumerate(wanted, start=1):
                for each in heard:
                    each.receive = receive
                total, more = output(logits).sum(), number < len(wanted)
                torch.autograd.grad(total, anchor, retain_graph=more, allow_unused=True)
                for each in heard:
                    each.flush()
        return logits.detach()

    @contextmanager
    def _listening(self, anchor: Tensor) -> Iterator[list[_Heard]]:
        heard = [
            _Heard(
                self.module.get_submodule(path),
                f"{path}." if path else "",
                block_bytes=self.block_bytes,
            )
            for path in self.layers
        ]
        with ExitStack() as hooks:
            for each in heard:
                hooks.callback(each.layer.register_forward_hook(_tap(each, anchor)).remove)
            yield heard


def _tap(heard: _Heard, anchor: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        call = heard.called(inputs[0])
        if (
            output._base is not None
        ):  # autograd refuses to let a view of a custom function's pass as its own output
            output = output.clone()
        tapped: Tensor = _Tap.apply(output, anchor, lambda grad: heard.arrived(call, grad))
        return tapped

    return hook


class _Tap(torch.autograd.Function):
    """The identity, which tells the gradient that passes; what follows may work in place on its output.

    A hook on the tensor would need an output that has a graph, which that of the first layer has not.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, tell: Callable[[Tensor], None]) -> Tensor:
        ctx.tell = tell
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.tell(grad)
        return grad if ctx.needs_input_grad[0] else None, None, None


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient while this is open: none is computed for them by autograd."""
    trainable = [value for value in module.parameters() if value.requires_grad]
    for value in trainable:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in trainable:
            value.requires_grad_(True)


def layers_with_closed_form(module: nn.Module, probes: Collection[Tensor]) -> set[str]:
    """Names of the layers whose per-sample gradients can be had from their inputs and outputs.

    Found by forward passes: such a layer has a closed form, does not share its parameters with another, is called
    and takes and gives one tensor with a row for each sample.

    Args:
        module: in evaluation mode.
        probes: images (B, Ch, H, W), for several B.
    """
    found = {name for name, layer in module.named_modules() if has_closed_form(layer)} - _sharing(module)
    for probe in probes:
        found &= _plain(module, found, probe)
    return found


def _sharing(module: nn.Module) -> set[str]:
    """Names of layers one of whose parameters has another name too."""
    owners: dict[int, set[str]] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(value), set()).add(name)
    shared = {name for names in owners.values() if len(names) > 1 for name in names}
    return {name.rpartition(".")[0] for name in shared}


@torch.no_grad()
def _plain(module: nn.Module, names: set[str], images: Tensor) -> set[str]:
    """Of the layers `names` those that are called as a closed form needs it."""
    called: set[str] = set()
    unfit: set[str] = set()

    def listen(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            called.add(name)
            values = (*inputs, output)
            if len(values) != 2 or not all(_has_rows(value, len(images)) for value in values):
                unfit.add(name)

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(module.get_submodule(name).register_forward_hook(listen(name)).remove)
        module(images)
    return called - unfit


def _has_rows(value: object, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows
