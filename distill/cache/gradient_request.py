"""What can be asked of per-sample gradients, and how an answer is added up parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.cache.layer_gradients import Gradient, Outer
from distill.cache.layer_patterns import as_patterns, matching, nearest_pattern
from distill.cache.projections import Projection, Projector, flat
from distill.errors import InputError
from distill.registry import nearest

Output = Literal["loss", "margin"]


@dataclass(frozen=True)
class GradientRequest:
    """Which gradients, and what of them.

    Args:
        layers: glob patterns; a parameter counts where one of them fits its name (`body.0.weight`) or that of a
            module that holds it (`body.0`, `body`).
        of: the cross-entropy with the label, or the margin z_y - log sum_{c != y} exp z_c.
        projection: how gradients are projected; None asks for their lengths.
    """

    layers: tuple[str, ...] = ("*",)
    of: Output = "loss"
    projection: Projection | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_patterns(self.layers))
        refuse_other(self.of, get_args(Output))


def refuse_other(of: str, allowed: Sequence[str]) -> None:
    """Raise InputError where `of` is none of the allowed words."""
    if of in allowed:
        return
    close = nearest(str(of), list(allowed))
    fix = f"did you mean {close!r}?" if close else None
    raise InputError("of is none of these", where="of", found=repr(of), allowed=", ".join(allowed), fix=fix)


class Answer:
    """The answer to one request, added up over parameters.

    Args:
        request: what is asked for.
        names: of the parameters that count.
        projector: of the request's projection.
    """

    def __init__(self, request: GradientRequest, names: Sequence[str], projector: Projector | None) -> None:
        self.request = request
        self.names = frozenset(names)
        self.projector = projector

    def empty(self, rows: int, *, like: Tensor) -> Tensor:
        """Zeros to add to: (rows, k), or (rows,) for squared lengths."""
        if self.request.projection is None:
            return like.new_zeros(rows)
        return like.new_zeros(rows, self.request.projection.dim)

    def add(self, out: Tensor, name: str, gradient: Gradient) -> None:
        """Add the gradients of parameter `name`, for the samples whose rows of the answer `out` is."""
        if name not in self.names:
            return
        if self.projector is None:
            out += squared_norms(gradient)
        elif not isinstance(gradient, Outer):
            self.projector.add(out, name, gradient)
        elif self.projector.takes_factors(gradient.shape, positions=gradient.positions):
            self.projector.add_outer(out, name, gradient.left, gradient.right)
        else:
            self.projector.add(out, name, gradient.formed)

    def finish(self, out: Tensor) -> Tensor:
        """What was asked for, of the finished sum."""
        return out.sqrt() if self.projector is None else out


def squared_norms(gradient: Gradient) -> Tensor:
    """(B,); a gradient of one position need not be formed for it."""
    if not isinstance(gradient, Outer):
        return _squared_norms(gradient)
    if gradient.positions > 1:
        return _squared_norms(gradient.formed)
    left, right = (factor.square().sum(dim=(1, 2)) for factor in (gradient.left, gradient.right))
    return left * right


def _squared_norms(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(flat(values), dim=1).square()


def output_of(logits: Tensor, labels: Tensor, of: Output) -> Tensor:
    """What is differentiated: (B,) from logits (B, C) and labels int64 (B,)."""
    if of == "loss":
        return F.cross_entropy(logits, labels, reduction="none")
    own = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    others = logits.masked_fill(own, -torch.inf).logsumexp(dim=1)
    return (logits * own).sum(dim=1) - others


def answers_to(requests: Iterable[GradientRequest], parameters: Sequence[str]) -> list[Answer]:
    """An empty answer for each request; equal projections share their projector.

    Args:
        requests: what is asked for.
        parameters: names of the network's parameters.

    Raises:
        InputError: a pattern that fits no parameter.
    """
    projectors: dict[Projection | None, Projector | None] = {None: None}
    answers = []
    for request in requests:
        projection = request.projection
        if projection is not None and projection not in projectors:
            projectors[projection] = Projector(projection)
        answers.append(Answer(request, selected(parameters, request.layers), projectors[projection]))
    return answers


def selected(parameters: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The parameters that patterns select, in the network's order.

    Raises:
        InputError: a pattern that fits no parameter, or no pattern at all.
    """
    chosen = matching(parameters, patterns, refused=_fits_nothing)
    if not chosen:
        raise InputError(
            "no parameters are asked for",
            where="layers",
            found="()",
            fix='name some, or leave layers out for all: ("*",)',
        )
    return chosen


def _fits_nothing(pattern: str, parameters: Sequence[str]) -> InputError:
    close = nearest_pattern(pattern, parameters)
    return InputError(
        f"no parameter of the network fits the pattern {pattern!r}",
        where="layers",
        found=pattern,
        allowed=f"patterns for {', '.join(parameters)}, or for the modules that hold them",
        fix=f"did you mean {close!r}?" if close else None,
    )
