"""Per-sample gradients of a network in evaluation mode: projected to k dimensions, or their lengths.

    g_i = d f(z(x_i), y_i) / d theta,   f = cross-entropy, or the margin z_y - log sum_{c != y} exp z_c

The margin is TRAK's output function (Park et al., "TRAK: Attributing Model Behavior at Scale", ICML 2023, section 3.1);
the length of the cross-entropy's gradient is GraNd (Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet",
NeurIPS 2021, definition 2.1).

Two ways, chosen for each layer, so that values do not depend on what else is asked:

- layers that have a closed form (`distill.cache.layer_pass`): one forward and backward pass for all of them;
- all other parameters (attention, free tensors; `distill.cache.functional_pass`): torch.func's vmap(grad) by these
  alone, several times slower on convolutions.

A request for both kinds of layers goes both ways, and the parts are added up.

How many samples go through at once follows from the network, the image size and `work_bytes` alone: the bytes of live
tensors are counted on black images (`distill.cache.live_bytes`) and never read off the machine, so that a request
gives the same bits again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from distill.cache.functional_pass import FunctionalPass
from distill.cache.gradient_request import Answer, GradientRequest, Output, answers_to, output_of
from distill.cache.layer_gradients import Gradient, Outer
from distill.cache.layer_pass import LayerPass, layers_with_closed_form
from distill.cache.live_bytes import rows_within
from distill.errors import InputError

__all__ = ["MAX_ROWS", "GradientPass", "GradientRequest"]

MAX_ROWS = 256  # samples of a block

_Found = tuple[Answer, Tensor]


class GradientPass:
    """Per-sample gradients by blocks of at most 256 images.

    `shares_forward` tells that `run` calls `module(images)` exactly once, on the whole block: forward hooks on the
    module then see what they see in a plain pass, and the logits have its bits. It takes closed forms for all that is
    asked for, and memory for a whole block. Otherwise `run` calls the module as it likes, on parts of the block, and
    gives no logits.

    Args:
        module: in evaluation mode; its parameters, and whether they require gradients, stay as they are.
        requests: what is asked for, each once.
        image_shape: (Ch, H, W) of the images to come.
        work_bytes: memory for the tensors of a pass; if one sample takes more, samples go through one by one.

    Raises:
        InputError: a pattern that fits no parameter, or margins of a single class.
    """

    def __init__(
        self,
        module: nn.Module,
        requests: Sequence[GradientRequest],
        *,
        image_shape: tuple[int, int, int],
        work_bytes: int,
    ) -> None:
        assert not any(each.training for each in module.modules())
        answers = answers_to(requests, [name for name, _ in module.named_parameters()])
        probes = _black(module, 2, image_shape), _black(module, 4, image_shape)
        _refuse_margins_of_one_class(module, requests, probes[0])
        closed = layers_with_closed_form(module, probes)
        self._answers = answers
        self._ways: list[_ByLayer | _InGeneral] = []
        by_layer = _restricted(answers, lambda layer: layer in closed)
        if by_layer:
            self._ways.append(_ByLayer(module, by_layer, closed, probes, work_bytes))
        in_general = _restricted(answers, lambda layer: layer not in closed)
        self._ways += _in_general(module, in_general, probes, work_bytes)
        self.shares_forward = bool(by_layer) and not in_general and self._ways[0].rows == MAX_ROWS

    def run(self, images: Tensor, labels: Tensor) -> tuple[Tensor | None, dict[GradientRequest, Tensor]]:
        """The answers to all requests.

        Args:
            images: (B, Ch, H, W) as the network takes them, B at most 256.
            labels: int64 (B,).

        Returns:
            Logits (B, C), None unless `shares_forward`; and by request projected gradients (B, k) or their lengths
            (B,), in the images' dtype.
        """
        assert len(images) == len(labels) <= MAX_ROWS
        logits: Tensor | None = None
        sums = {answer.request: answer.empty(len(images), like=images) for answer in self._answers}
        for way in self._ways:
            for start in range(0, len(images), way.rows):
                rows = slice(start, start + way.rows)
                wanted = [(answer, sums[answer.request][rows]) for answer in way.answers]
                seen = way.run(images[rows], labels[rows], wanted)
                logits = seen if self.shares_forward and seen is not None else logits
        return logits, {answer.request: answer.finish(sums[answer.request]) for answer in self._answers}


class _ByLayer:
    """Answers by closed forms; the rows at once are those of a pass that listens to all layers which have one."""

    def __init__(
        self,
        module: nn.Module,
        answers: list[Answer],
        closed: set[str],
        probes: tuple[Tensor, Tensor],
        work_bytes: int,
    ) -> None:
        self.answers = answers
        everything = LayerPass(module, sorted(closed), block_bytes=work_bytes)
        self.rows = rows_within(work_bytes, lambda images: _listen(everything, images), probes, most=MAX_ROWS)
        wanted = set().union(*(_layers(answer) for answer in answers))
        self._pass = LayerPass(module, sorted(wanted), block_bytes=work_bytes)
        self._add = partial(_add, block_bytes=self._pass.block_bytes)

    def run(self, images: Tensor, labels: Tensor, sums: Sequence[_Found]) -> Tensor:
        """Logits (B, C); adds to the sums."""
        outputs: dict[Output, list[_Found]] = {}
        for answer, out in sums:
            outputs.setdefault(answer.request.of, []).append((answer, out))
        wanted = [
            (partial(output_of, labels=labels, of=of), partial(self._add, its)) for of, its in outputs.items()
        ]
        return self._pass.run(images, wanted)


class _InGeneral:
    """Answers by vmap(grad), of one output by one set of parameters."""

    def __init__(
        self, module: nn.Module, answers: list[Answer], probes: tuple[Tensor, Tensor], work_bytes: int
    ) -> None:
        self.answers = answers
        self._pass = FunctionalPass(module, sorted(answers[0].names))
        self._output = partial(output_of, of=answers[0].request.of)
        self.rows = rows_within(work_bytes, self._gradients, probes, most=MAX_ROWS)

    def run(self, images: Tensor, labels: Tensor, sums: Sequence[_Found]) -> None:
        """Adds to the sums."""
        for name, gradient in self._pass.run(images, labels, self._output).items():
            for answer, out in sums:
                answer.add(out, name, gradient)

    def _gradients(self, images: Tensor) -> object:
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        return self._pass.run(images, labels, self._output)


def _in_general(
    module: nn.Module, answers: list[Answer], probes: tuple[Tensor, Tensor], work_bytes: int
) -> list[_InGeneral]:
    groups: dict[object, list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.names, answer.request.of), []).append(answer)
    return [_InGeneral(module, group, probes, work_bytes) for group in groups.values()]


def _restricted(answers: Sequence[Answer], fits: Callable[[str], bool]) -> list[Answer]:
    """The answers for parameters of fitting layers alone, without those that have none."""
    parts = [
        Answer(each.request, [name for name in each.names if fits(_layer(name))], each.projector)
        for each in answers
    ]
    return [part for part in parts if part.names]


def _add(sums: Sequence[_Found], rows: slice, name: str, gradient: Gradient, *, block_bytes: int) -> None:
    """Add gradients of a parameter: a few samples at a time to the answers that need a product formed."""
    wanted = [(answer, out[rows]) for answer, out in sums if name in answer.names]
    for answer, out in wanted:
        if not _forms(answer, gradient):
            answer.add(out, name, gradient)
    forming = [(answer, out) for answer, out in wanted if _forms(answer, gradient)]
    if forming:
        assert isinstance(gradient, Outer)
        for block, part in gradient.split(block_bytes):
            for answer, out in forming:
                answer.add(out[block], name, part)


def _forms(answer: Answer, gradient: Gradient) -> bool:
    """Whether the answer needs the product of factors."""
    if not isinstance(gradient, Outer):
        return False
    if answer.projector is None:
        return gradient.positions > 1
    return not answer.projector.takes_factors(gradient.shape, positions=gradient.positions)


def _listen(everything: LayerPass, images: Tensor) -> object:
    """A pass whose gradients go nowhere: its memory is that of the graph."""
    return everything.run(images, [(lambda logits: logits.sum(dim=1), lambda *_: None)])


def _layers(answer: Answer) -> set[str]:
    """Names of the layers that own the parameters."""
    return {_layer(name) for name in answer.names}


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _black(module: nn.Module, rows: int, image_shape: tuple[int, int, int]) -> Tensor:
    like = next(module.parameters())
    return like.new_zeros(rows, *image_shape).to(memory_format=torch.channels_last)


def _refuse_margins_of_one_class(
    module: nn.Module, requests: Sequence[GradientRequest], probe: Tensor
) -> None:
    with torch.no_grad():
        classes = module(probe).shape[1]
    if classes < 2 and any(request.of == "margin" for request in requests):
        raise InputError(
            "a margin compares classes, and there is one", where="of", found="margin", allowed="loss"
        )
