"""The one training loop: experts, teachers and students all pass through `train`.

It trains K networks of one shape at once on one device; who runs it, and how many of it side by side, is the
engine's affair (distill/training/engine.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import InputError, NonFiniteError
from distill.models import build
from distill.randomness import derive_seed
from distill.training.batches import Batch, Batches, DeviceImages
from distill.training.config import TrainConfig, learning_rate
from distill.training.gsam import replace_gradients
from distill.training.job import Job, Pool, Trained
from distill.training.memory import peak_bytes
from distill.training.networks import Networks, NetworkStack, SingleNetwork
from distill.training.precision import autocast
from distill.training.recording import DynamicsRecorder, WeightRecorder

_TEST_BLOCK = 1000  # images a forward pass; does not change results


def train(
    jobs: Sequence[Job],
    *,
    device: torch.device,
    dtype: torch.dtype,
    report: Callable[[int], None] = lambda steps: None,
) -> list[Trained]:
    """Train the networks of `jobs`, which share model, config, classes and number of samples.

    Args:
        jobs: one network each.
        device: where everything happens.
        dtype: of autocast regions; losses, updates and tests are float32.
        report: called after each epoch with the number of network steps done.

    Returns:
        One result a job, in order.

    Raises:
        NonFiniteError: a loss became NaN or infinite.
        InputError: batch norm was given a batch of one value a channel.
    """
    start = time.perf_counter()
    networks = build_networks(jobs, device)
    with _seeded(derive_seed(jobs[0].seed, "layers"), device):
        recorder = DynamicsRecorder(jobs, device) if jobs[0].record_dynamics else None
        weights = WeightRecorder(jobs, networks)
        losses = _fit(networks, jobs, recorder, weights, device=device, dtype=dtype, report=report)
    accuracies = _test(networks, jobs, device=device)
    states = networks.states() if any(job.keep_state for job in jobs) else [{} for _ in jobs]
    dynamics = recorder.dynamics() if recorder is not None else [None for _ in jobs]
    seconds, peak = time.perf_counter() - start, peak_bytes(device)
    return [
        Trained(
            loss=loss,
            accuracy=accuracy,
            seconds=seconds,
            peak_bytes=peak,
            state=state if job.keep_state else {},
            checkpoints=kept,
            dynamics=record,
        )
        for job, loss, accuracy, state, kept, record in zip(
            jobs, losses, accuracies, states, weights.states, dynamics, strict=True
        )
    ]


def build_networks(jobs: Sequence[Job], device: torch.device) -> Networks:
    """The networks of `jobs` with their initial weights."""
    modules = [initial_network(job) for job in jobs]
    return SingleNetwork(modules[0], device) if len(modules) == 1 else NetworkStack(modules, device)


def initial_network(job: Job) -> nn.Module:
    """The network of `job` before its first step, on the host."""
    seed = derive_seed(job.seed, "init")
    return build(job.model, image_shape=job.pool.image_shape, classes=job.classes, seed=seed)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Layers that draw from torch's global generators (dropout) draw by `seed`; the generators are put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _fit(
    networks: Networks,
    jobs: Sequence[Job],
    recorder: DynamicsRecorder | None,
    weights: WeightRecorder,
    *,
    device: torch.device,
    dtype: torch.dtype,
    report: Callable[[int], None],
) -> list[float]:
    """Train; the mean loss of the last epoch, one a network."""
    config, steps_per_epoch = jobs[0].config, jobs[0].steps_per_epoch
    batches = Batches(jobs, device)
    optimizer = make_optimizer(networks.parameters(), config)
    networks.train(True)
    total = torch.zeros(len(jobs), device=device)

    def backward(batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (K, B, C) and losses (K,) of a batch; the parameters hold their gradients then."""
        optimizer.zero_grad(set_to_none=True)
        found = []
        for part in batch.parts(config.micro_batches):
            with autocast(device, dtype), _batch_norm_errors(jobs[0]):
                logits = networks(part.images)
            logits = logits.float()
            losses = network_losses(
                logits,
                part.targets,
                config,
                temperature=batches.temperature,
                weights=part.weights,
                counts=part.counts,
                pairs=part.pairs,
                ratio=part.ratio,
            )
            losses = losses * part.share(batch)
            losses.sum().backward()
            found.append((logits.detach(), losses.detach()))
        every = torch.cat([logits for logits, _ in found], dim=1)
        return every, torch.stack([losses for _, losses in found]).sum(dim=0)

    step = 0
    weights.after(0)
    for epoch in range(config.epochs):
        total.zero_()
        for batch in batches.epoch(epoch):
            set_learning_rate(optimizer, config, step / steps_per_epoch)
            logits, losses = backward(batch)
            if recorder is not None:
                recorder.see(batch.index, logits, batch.targets)
            if config.gsam_rho > 0:
                replace_gradients(
                    networks.parameters(),
                    partial(backward, batch),
                    rho=config.gsam_rho,
                    alpha=config.gsam_alpha,
                    stacked=networks.stacked,
                )
            optimizer.step()
            total += losses
            step += 1
        _refuse_non_finite(total, jobs, epoch)
        weights.after(epoch + 1)
        report(steps_per_epoch * len(jobs))
    return (total / steps_per_epoch).tolist()


@contextmanager
def _batch_norm_errors(job: Job) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"batch norm cannot normalise a batch of one image in training {job.label}",
            found=f"{job.samples} images in batches of {job.config.batch_size}",
            fix="change batch_size, so that the last batch holds more than one image, or use another network",
        ) from error


def _refuse_non_finite(losses: Tensor, jobs: Sequence[Job], epoch: int) -> None:
    for job, loss in zip(jobs, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss of {job.label} became {loss} in epoch {epoch}",
                found=f"{job.config.optimizer}, lr {job.config.lr:g}, batch size {job.config.batch_size}",
                fix="lower lr (a tenth of it is a good next try), or set warmup_epochs",
            )


def make_optimizer(parameters: list[Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """Plain SGD with momentum, or AdamW (momentum is its first beta); one kernel a step for all parameters."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
    betas = (config.momentum, 0.999)
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, epoch: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)


def network_losses(
    logits: Tensor,
    targets: Tensor,
    config: TrainConfig,
    *,
    temperature: float,
    weights: Tensor | None = None,
    counts: Tensor | None = None,
    pairs: Tensor | None = None,
    ratio: Tensor | None = None,
) -> Tensor:
    """Mean loss of each network over its batch.

    Hard targets: cross-entropy, with label smoothing. Soft targets, of student logits z, by `config.loss`:

    - `cross_entropy`, `kl`: of probabilities p at temperature T, T^2 * sum_c p_c (log p_c - log softmax(z / T)_c), the
      first without the constant p log p. The factor T^2 keeps the gradient's size independent of T (Hinton et al.,
      2015, section 2), so that the choice of optimiser does not decide the result.
    - `mse`: the mean over classes of (z - t)^2, of the teacher's logits t.
    - `cosine`: 1 - cos(z, t) (Shang et al., "GIFT: Unlocking Full Potential of Labels in Distilled Dataset at
      Near-zero Cost", ICLR 2025, without their share of a tenth of the smoothed hard label in t: mixed views have no
      class of their own).
    - `dbr_l1`, `dbr_l2`: see `_distance_losses`; without pairs, where labels are classes, cross-entropy.

    Args:
        logits: float32 (K, B, C).
        targets: int64 (K, B); or float32 (K, B, C), probabilities or logits, see `soft_targets`.
        temperature: T; 1 where the targets come from classes and not from a teacher.
        weights: of the views, float32 (K, B), by which the mean is taken; None is 1 for all.
        counts: of the samples, float32 (K, B), by which their losses are multiplied before the mean: of mean 1 over all
            samples, so that batches together give the weighted mean over all; None is 1 for all.
        pairs, ratio: as in `Batch`, for the losses that compare distances.

    Returns:
        float32 (K,).
    """
    if pairs is not None and ratio is not None:
        per_sample = _distance_losses(logits, targets, config, pairs, ratio, temperature=temperature)
    else:
        per_sample = _sample_losses(logits, targets, config, temperature=temperature)
    if counts is not None:
        per_sample = per_sample * counts
    if weights is None:
        return per_sample.mean(dim=1)
    return (per_sample * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-12)


def _sample_losses(logits: Tensor, targets: Tensor, config: TrainConfig, *, temperature: float) -> Tensor:
    """The loss of every sample, float32 (K, B)."""
    if not targets.is_floating_point():
        flat = F.cross_entropy(
            logits.flatten(0, 1),
            targets.reshape(-1),
            reduction="none",
            label_smoothing=config.label_smoothing,
        )
        return flat.view(targets.shape)
    if config.loss == "mse":
        return (logits - targets).square().mean(dim=2)
    if config.loss == "cosine":
        return 1 - F.cosine_similarity(logits, targets, dim=2)
    per_sample = -(targets * F.log_softmax(logits / temperature, dim=2)).sum(dim=2)
    if config.loss == "kl":
        per_sample = per_sample + torch.xlogy(targets, targets).sum(dim=2)
    return per_sample * temperature**2


def _distance_losses(
    logits: Tensor, targets: Tensor, config: TrainConfig, pairs: Tensor, ratio: Tensor, *, temperature: float
) -> Tensor:
    """Distance-based representative transfer: the loss of every sample, float32 (K, B).

    Of a view that is mixed from images of classes o (share l) and a, with student logits z and teacher probabilities p
    at temperature T (Tran et al., "Enhancing Dataset Distillation via Non-Critical Region Refinement", CVPR 2025),

        l CE(z, o) + (1 - l) CE(z, a) + w sum over y in {o, a} of D(T d_y),
        d_y = -log softmax(z / T)_y + log p_y,

    with w = `dbr_weight`, and D the absolute value (`dbr_l1`) or the square (`dbr_l2`); the paper does not say which.
    As elsewhere T keeps the gradient's size independent of T.
    """
    nearness = F.log_softmax(logits, dim=2).gather(2, pairs)
    hard = -(ratio * nearness[..., 0] + (1 - ratio) * nearness[..., 1])
    tiny = torch.finfo(targets.dtype).tiny
    theirs = targets.gather(2, pairs).clamp(min=tiny).log()
    gap = temperature * (theirs - F.log_softmax(logits / temperature, dim=2).gather(2, pairs))
    distance = gap.abs() if config.loss == "dbr_l1" else gap.square()
    return hard + config.dbr_weight * distance.sum(dim=2)


def _test(networks: Networks, jobs: Sequence[Job], *, device: torch.device) -> list[float | None]:
    """Accuracy of every network on its job's test pool (the pools of one call are the same)."""
    pool = jobs[0].test
    if pool is None:
        return [None for _ in jobs]
    assert all(job.test is pool for job in jobs), "networks trained together are tested together"
    return list(accuracies(networks, pool, device=device))


@torch.no_grad()
def accuracies(networks: Networks, pool: Pool, *, device: torch.device) -> list[float]:
    """Share of `pool` (int64 targets) that each of the K networks classifies rightly, without augmentation."""
    networks.train(False)
    images, labels = DeviceImages(pool, device), pool.targets.to(device)
    right: Tensor | int = 0
    start = 0
    for block in images.blocks(_TEST_BLOCK):
        predicted = networks.on_shared(block).argmax(dim=2)  # (K, B)
        right = right + (predicted == labels[start : start + len(block)]).sum(dim=1)
        start += len(block)
    assert isinstance(right, Tensor)
    return (right.double() / len(pool)).tolist()
