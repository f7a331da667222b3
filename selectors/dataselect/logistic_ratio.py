"""How much likelier the target makes a sample than the source does, by a classifier that tells the two apart.

    log w(x) = ln p(x) / q(x) = logit(x) - ln(n_p / n_q),   logit(x) = a + <b, z(x)>

    min_{a, b}  sum_i ln(1 + exp(-y_i logit(x_i))) + lambda / 2 ||b||_2^2,   y_i = 1 for the target's n_p, -1 for n_q

By Bayes' rule the odds of the target are p(x) n_p / (q(x) n_q) (Bickel, Brückner and Scheffer, "Discriminative Learning
Under Covariate Shift", JMLR 2009; Sugiyama, Suzuki and Kanamori, "Density Ratio Estimation in Machine Learning", 2012,
chapter 4). lambda = regularisation D: whatever the number D of features, of variance 1, the prior that lambda stands
for gives the logits of samples the variance 1 / regularisation.

A sample that the classifier learnt as one of the source's gets a lower weight for it, the more so the more features
there are to know it by. So source and target are cut into folds by chance, and each fold is scored by a classifier that
learnt from the others. On the logits of such samples the prior is corrected: they are multiplied by what makes them log
ratios (dataselect/calibration.py), so that regularisation decides how well they rank and little else.

The classifiers of all folds are fitted at once by Newton's method in float64; steps are solved by conjugate gradients
preconditioned by the Hessian of all rows at the folds' mean, which is computed anew where they take long, and halved
until they lower the losses. Each pass reads the features by blocks; the run tells how many it took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dataselect.calibration import calibrate
from dataselect.standard_features import block_rows, places
from distill.errors import InputError
from distill.randomness import generator

# The last step moves no logit by more than this share of its standard error (Newton's decrement); what is left after
# it is about the square of that.
_TOLERANCE = 1e-4
_STEPS = 100
_INNER = 1000  # of conjugate gradients, for a step
# By which share the squared size of a residual falls: its own size, within limits. Below the last it counts as 0.
_ROUGH, _EXACT, _NOTHING = 1e-2, 1e-8, 1e-20
_WORTH = 4  # passes that are no reason to compute the preconditioner anew
_NARROW = 8  # how much slower products with narrow matrices are
_HALVINGS = 40
_ROUNDING = 1e-12  # of a sum of losses


class Fitted(NamedTuple):
    """What the classifiers say of the samples that they did not learn from; with one fold, of all.

    Attributes:
        candidates: log w, float64 (N,), on the device that computes.
        target: log w, float64 (M,), likewise.
        scale: by what logits were multiplied; 1 with one fold.
        loss: mean of -ln P(own side) over source and target, each half of it, with log w as the logit; ln 2 is chance.
    """

    candidates: Tensor
    target: Tensor
    scale: float
    loss: float


def logistic_ratio(
    candidates: Tensor,
    target: Tensor,
    *,
    regularisation: float,
    folds: int,
    seed: int,
    memory: int = 4 << 30,
    advance: Callable[[], None] = lambda: None,
) -> Fitted:
    """Estimate log w of candidates, and of the target itself.

    Args:
        candidates: float32 (N, D), standardised, on any device, or in a file.
        target: float32 (M, D), standardised, on the device that computes.
        regularisation: above 0.
        folds: K; 1 scores each sample by the one classifier that learnt from all.
        seed: of the folds.
        memory: bytes that the Hessian may take; beyond it its diagonal preconditions alone, in more passes.
        advance: called after every pass over the features.

    Raises:
        InputError: fewer samples than folds.
    """
    for rows, name in ((candidates, "data"), (target, "target")):
        refuse_few(len(rows), folds, name)
    sides = _Sides(candidates, target, folds, seed, advance)
    models = _fit(sides, regularisation * target.shape[1], memory)
    taught = sides.taught()  # (2, K), samples that each classifier learnt from
    prior = (taught[1] / taught[0]).log()
    source, own = (sides.own_logits(side, models) for side in (0, 1))
    source, own = source - prior[sides.folds[0]], own - prior[sides.folds[1]]
    scale = 1.0
    if folds > 1:
        shift, scale = calibrate(source.cpu().numpy(), own.cpu().numpy())
        source, own = shift + scale * source, shift + scale * own
    loss = (F.softplus(source).mean() + F.softplus(-own).mean()) / 2
    return Fitted(source, own, scale, float(loss))


def refuse_few(there: int, folds: int, name: str) -> None:
    """Raise InputError where samples are fewer than the folds that they are to be cut into."""
    if there < folds:
        raise InputError(
            f"{there} images of the {name} cannot be cut into {folds} folds",
            where="folds",
            found=f"{folds}",
            allowed=f"at most {there}",
            fix="lower folds (with 1 images are scored by what learnt from them), or choose another ratio",
        )


class _Sides:
    """Source (side 0) and target (side 1) by blocks, and which of K classifiers learns from which row.

    Args:
        candidates, target, folds, seed, advance: as for `logistic_ratio`.
    """

    def __init__(
        self, candidates: Tensor, target: Tensor, folds: int, seed: int, advance: Callable[[], None]
    ) -> None:
        self.parts = (candidates, target)
        self.device = target.device
        self.width = target.shape[1]
        self.count = folds
        self.folds = [
            _cut(len(part), folds, seed, side).to(self.device) for side, part in enumerate(self.parts)
        ]
        self.advance = advance

    def blocks(self, side: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and float64 (b, D + 1): their features, and 1; in one place, which the next ones take."""
        part = self.parts[side]
        room = torch.ones(block_rows(self.width), self.width + 1, dtype=torch.float64, device=self.device)
        for place in places(len(part), self.width):
            block = room[: place.stop - place.start]
            block[:, :-1] = part[place]
            yield place, block

    def learnt(self, side: int, place: slice) -> Tensor:
        """1 where a classifier learns from a row, 0 where it will score it: float64 (b, K)."""
        if self.count == 1:
            return torch.ones(place.stop - place.start, 1, dtype=torch.float64, device=self.device)
        return (self.folds[side][place, None] != torch.arange(self.count, device=self.device)).double()

    def taught(self) -> Tensor:
        """Rows that each classifier learns from: float64 (2, K)."""
        sizes = [torch.bincount(folds, minlength=self.count) for folds in self.folds]
        own = torch.stack(sizes).double()
        return own if self.count == 1 else own.sum(dim=1, keepdim=True) - own

    def own_logits(self, side: int, models: Tensor) -> Tensor:
        """Logits of each row by the classifier of its own fold: float64 (rows,)."""
        out = torch.empty(len(self.parts[side]), dtype=torch.float64, device=self.device)
        for place, block in self.blocks(side):
            out[place] = (block @ models).gather(1, self.folds[side][place, None])[:, 0]
        return out

    def losses(self, models: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """The objectives, float64 (K,), and their gradients, (D + 1, K), at models (D + 1, K)."""
        penalised = _without_intercept(models)
        losses, gradients = ridge / 2 * penalised.square().sum(dim=0), ridge * penalised
        for side in (0, 1):
            for place, block in self.blocks(side):
                logits, learnt = block @ models, self.learnt(side, place)
                losses += (F.softplus(-logits if side else logits) * learnt).sum(dim=0)
                gradients += block.T @ ((logits.sigmoid() - side) * learnt)
        self.advance()
        return losses, gradients

    def curved(self, models: Tensor, directions: Tensor, ridge: float) -> Tensor:
        """The Hessian of each objective times a direction: (D + 1, K)."""
        out = ridge * _without_intercept(directions)
        both = torch.cat([models, directions], dim=1)
        for side in (0, 1):
            for place, block in self.blocks(side):
                logits, slopes = (block @ both).split(self.count, dim=1)
                chances = logits.sigmoid()
                out += block.T @ (chances * (1 - chances) * self.learnt(side, place) * slopes)
        self.advance()
        return out


def _cut(count: int, folds: int, seed: int, side: int) -> Tensor:
    """The fold of each of so many rows, folds of like sizes: int64 (count,)."""
    order = torch.randperm(count, generator=generator(seed, "folds", side))
    cut = torch.empty(count, dtype=torch.int64)
    cut[order] = torch.arange(count) % folds
    return cut


def _without_intercept(models: Tensor) -> Tensor:
    """A copy of models (D + 1, K) with 0 for the intercepts."""
    out = models.clone()
    out[-1] = 0.0
    return out


def _fit(sides: _Sides, ridge: float, memory: int) -> Tensor:
    """The classifiers: float64 (D + 1, K), the intercepts last."""
    taught = sides.taught()
    models = torch.zeros(sides.width + 1, sides.count, dtype=torch.float64, device=sides.device)
    models[-1] = (taught[1] / taught[0]).log()  # the optimum at b = 0
    losses, gradients = sides.losses(models, ridge)
    whole = 3 * 8 * len(models) ** 2 <= memory
    # Passes that take as long as a Hessian: it has D / (4 K) times their products, and they are of narrow matrices.
    worth = len(models) // (4 * _NARROW * sides.count) + _WORTH
    taken = worth + 1
    for _ in range(_STEPS):
        if taken > worth:
            precondition = _preconditioner(sides, models, ridge, whole=whole)
        steps, taken = _newton_steps(sides, models, gradients, ridge, precondition)
        slopes = (gradients * steps).sum(dim=0)  # minus the decrement's square
        models, losses, gradients = _descend(sides, models, steps, slopes, losses, gradients, ridge)
        if float(slopes.min()) >= -(_TOLERANCE**2):
            return models
    raise InputError(
        f"the classifier of source and target is not found within {_STEPS} steps",
        where="regularisation",
        fix="raise regularisation, or choose another ratio",
    )


def _newton_steps(
    sides: _Sides, models: Tensor, gradients: Tensor, ridge: float, precondition: Callable[[Tensor], Tensor]
) -> tuple[Tensor, int]:
    """Minus the inverse of each Hessian times the gradient, the more precisely the smaller it is: (D + 1, K).

    And how many passes over the features it took.
    """
    steps, residuals = torch.zeros_like(gradients), -gradients
    smoothed = precondition(residuals)
    directions, sizes = smoothed, (residuals * smoothed).sum(dim=0)
    wanted = (sizes * sizes.clamp(_EXACT, _ROUGH)).clamp(min=_NOTHING)
    passes = 0
    while passes < _INNER and bool((going := sizes > wanted).any()):
        curved = sides.curved(models, directions, ridge)
        passes += 1
        lengths = torch.where(going, sizes / (directions * curved).sum(dim=0), 0.0)
        steps, residuals = steps + lengths * directions, residuals - lengths * curved
        smoothed = precondition(residuals)
        after = (residuals * smoothed).sum(dim=0)
        directions = torch.where(going, smoothed + after / sizes * directions, directions)
        sizes = torch.where(going, after, sizes)
    return steps, passes


def _descend(
    sides: _Sides,
    models: Tensor,
    steps: Tensor,
    slopes: Tensor,
    losses: Tensor,
    gradients: Tensor,
    ridge: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Models after the longest of the steps, halves, quarters, ... that lower the losses; their losses, gradients."""
    lengths = torch.ones_like(slopes)
    for _ in range(_HALVINGS):
        moved = models + lengths * steps
        found, there = sides.losses(moved, ridge)
        rises = found > losses + 1e-4 * lengths * slopes + _ROUNDING * losses
        if not bool(rises.any()):
            return moved, found, there
        lengths = torch.where(rises, lengths / 2, lengths)
    return models, losses, gradients


def _preconditioner(
    sides: _Sides, models: Tensor, ridge: float, *, whole: bool
) -> Callable[[Tensor], Tensor]:
    """Multiplies by the inverse of the Hessian at the mean of the models, of all rows, or by that of its diagonal."""
    mean, width = models.mean(dim=1, keepdim=True), len(models)
    hessian = models.new_zeros(width, width if whole else 1)
    for side in (0, 1):
        for _, block in sides.blocks(side):
            chances = (block @ mean).sigmoid()
            curvatures = chances * (1 - chances)  # (b, 1)
            if whole:
                hessian.addmm_(block.T, curvatures * block)
            else:
                hessian.addmm_(block.square().T, curvatures)
    sides.advance()
    if not whole:
        hessian[:-1] += ridge
        return lambda gradients: gradients / hessian
    hessian.diagonal()[:-1].add_(ridge)
    factor = torch.linalg.cholesky(hessian)
    return lambda gradients: torch.cholesky_solve(gradients, factor)
