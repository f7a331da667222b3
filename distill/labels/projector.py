"""Labels by a projector: what a set stores of it, and how it is had again.

A set stores the low-rank matrices, s and b (distill/labels/projection.py) as the bytes of a safetensors file, and of
the public encoder its name, the sha256 of its weights and their size. Who has that file has the labels of every view.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill.cache.forward import logits_of
from distill.cache.identity import cache_key
from distill.cache.networks import Network, load_network, save_network
from distill.contracts import Context, DistilledSet, SoftLabels, Source
from distill.errors import DamagedDataError, InputError
from distill.files import write_bytes_atomically
from distill.labels.codecs import PROJECTOR, VIEWS
from distill.labels.ensemble import Ensemble
from distill.labels.projection import Projection, Projector, start_of
from distill.labels.projector_fit import Fit
from distill.labels.view_labels import checked, plan_attributes
from distill.models.encoders import behind, file_facts, open_encoder
from distill.models.projector import ProjectorModel
from distill.training.job import ViewPlan


class _Told(BaseModel):
    """How a set's attributes tell which projector labels it."""

    model_config = ConfigDict(extra="ignore")

    projection: Projection
    bytes: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]

    @model_validator(mode="after")
    def _of_a_known_file(self) -> Self:
        if self.projection.encoder.sha256 is None or self.projection.encoder.weights is not None:
            raise ValueError("the encoder is known by the sha256 of its weights, and by no path")
        return self


def project(
    ctx: Context,
    source: Source,
    plain: DistilledSet,
    weak: Ensemble,
    how: Projection,
    plan: ViewPlan,
    *,
    attributes: dict[str, Any],
) -> SoftLabels:
    """Fit a projector, and give the labels that a set stores of it.

    Args:
        ctx, source: of the run.
        plain: the set's images.
        weak: the teachers that it is fitted to.
        how: options.
        plan: of the views that it will label.
        attributes: facts that the labels carry.

    Raises:
        NonFiniteError: its loss became NaN or infinite.
    """
    sha256, size = file_facts(how.encoder)
    known, seed = how.on(how.encoder.weights, sha256=sha256), ctx.derive("projector")
    path = ctx.scratch / f"projector-{sha256[:16]}.safetensors"
    if not path.exists():
        fit = Fit(ctx, source, plain, weak, known, plan, seed=seed)
        _tell_ranks(ctx, how, fit.projector)
        write_bytes_atomically(path, fit.packed())
    told = {
        "projection": how.on(None, sha256=sha256).model_dump(mode="json"),
        "bytes": size,
        "seed": seed,
    }
    facts = {**attributes, PROJECTOR: told, VIEWS: plan_attributes(plan)}
    adapter = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    soft = SoftLabels(PROJECTOR, {"adapter": adapter}, facts)
    made = DistilledSet(plain.images, plain.labels, plain.classes, plain.preprocessing, plain.train, soft)
    network = open_projector(ctx, source, made, encoder=Path(str(how.encoder.weights)))
    _tell(ctx, source, network, adapter.nbytes)
    return soft


def check_encoder(soft: SoftLabels | None, encoder: Path) -> None:
    """Raise InputError or DamagedDataError where a file is not the encoder's that labels need; costs no data."""
    if soft is None or soft.codec != PROJECTOR:
        raise InputError(
            "no public encoder labels this set", where="--encoder", found=str(encoder), fix="leave it out"
        )
    _with_file(_told(soft), encoder)


def encoder_bytes(soft: SoftLabels | None) -> int:
    """Bytes of the encoder's file that labels need beside the set; 0 for labels that need none."""
    return soft.attributes[PROJECTOR]["bytes"] if soft is not None and soft.codec == PROJECTOR else 0


def open_projector(
    ctx: Context, source: Source, distilled: DistilledSet, *, encoder: Path | None = None
) -> Network:
    """The projector that labels a set: from the cache, or from its adapter and the encoder's file.

    Args:
        ctx: its cache and device.
        source: whose classes it tells apart.
        distilled: the set.
        encoder: the file of the encoder's weights.

    Raises:
        InputError: the projector is not in the cache, and no file was named; or the adapter does not fit.
        DamagedDataError: the file has another sha256, or the set does not say what labels it.
    """
    soft = distilled.soft
    assert soft is not None and soft.codec == PROJECTOR, "labels by a projector"
    told = _told(soft)
    data = soft.arrays["adapter"].tobytes()
    how = told.projection
    if encoder is not None:
        how = _with_file(told, encoder)
    model, preprocessing = ProjectorModel(encoder=told.projection.encoder), behind(how.encoder)
    key = cache_key("network", _identity(distilled, told, data))
    known = load_network(
        ctx.cache.networks_folder,
        key,
        model=model,
        image_shape=source.image_shape,
        classes=len(source.classes),
        preprocessing=preprocessing,
        progress=ctx.progress,
    )
    if known is not None:
        return known
    if encoder is None:
        raise InputError(
            f"a public encoder labels this set, {how.encoder.name}, and its weights are not at hand",
            found="no file of weights, and no such projector in the cache",
            allowed=f"the file of sha256 {how.encoder.sha256}",
            fix="name it: distill evaluate SET --encoder FILE",
        )
    began = time.perf_counter()
    projector = Projector(open_encoder(how.encoder), start_of(ctx, distilled, how), how, seed=told.seed)
    projector.load(data)
    facts = {
        "seconds": time.perf_counter() - began,
        "peak_bytes": 0,
        "valid_accuracy": None,
        "loss": None,
        "data": None,
        "model": model.describe(),
        "epochs": 0,
    }
    network = Network(model, source.image_shape, len(source.classes), preprocessing, projector.state(), facts)
    save_network(ctx.cache.networks_folder, key, network)
    return network


def _told(soft: SoftLabels) -> _Told:
    what = "the set does not say which projector labels it"
    return checked(_Told, soft.attributes.get(PROJECTOR), what=what)


def _identity(distilled: DistilledSet, told: _Told, data: bytes) -> dict[str, Any]:
    """Everything that decides what the projector says."""
    images = distilled.images.permute(0, 2, 3, 1).contiguous().numpy()
    preprocessing = distilled.preprocessing
    return {
        "projector": told.model_dump(mode="json"),
        "adapter": hashlib.sha256(data).hexdigest(),
        "images": hashlib.sha256(images.tobytes()).hexdigest(),
        "labels": hashlib.sha256(distilled.labels.numpy().tobytes()).hexdigest(),
        "classes": list(distilled.classes),
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }


def _with_file(told: _Told, encoder: Path) -> Projection:
    """The options with the encoder's file.

    Raises:
        InputError: no such file.
        DamagedDataError: another file than the set says.
    """
    sha256 = str(told.projection.encoder.sha256)
    how = told.projection.on(str(encoder), sha256=sha256)
    try:
        found, size = file_facts(how.encoder)
    except InputError as error:
        error.where, error.found = "--encoder", f"{encoder}: {error.found}"
        error.fix = f"name the file of {how.encoder.name} with sha256 {sha256}"
        raise
    if (found, size) != (sha256, told.bytes):
        raise DamagedDataError(
            "these are not the weights of the encoder that labels this set",
            where=str(encoder),
            found=f"sha256 {found}, {size:,} bytes",
            allowed=f"sha256 {sha256}, {told.bytes:,} bytes",
            fix=f"name the file of {told.projection.encoder.name} that the set was made with",
        )
    return how


def _tell_ranks(ctx: Context, how: Projection, projector: Projector) -> None:
    """Say where adapters are smaller than asked for."""
    cut = [f"{name} {rank}" for name, rank in projector.cut_ranks(how).items()]
    if cut:
        more = f" and {len(cut) - 3} more" if len(cut) > 3 else ""
        ctx.progress.note(f"ranks that would save nothing are cut: {', '.join(cut[:3])}{more}")


def _tell(ctx: Context, source: Source, network: Network, size: int) -> None:
    told = ""
    if len(source.valid):
        logits = logits_of(network, source.valid, device=ctx.device)
        right = float((logits.argmax(dim=1).cpu() == source.valid.labels).float().mean())
        told = f", {right:.1%} right on {len(source.valid)} validation images"
    ctx.progress.note(f"{network.facts['model']}: {size:,} bytes are stored{told}", bytes=size)
