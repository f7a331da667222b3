"""Public encoders as networks of the cache: their features are its rows, made in the same passes."""

from __future__ import annotations

import torch

from distill.cache.networks import Network
from distill.models.encoders import (
    EncoderConfig,
    behind,
    feature_count,
    open_encoder,
    outline,
    refuse_absent_weights,
)
from distill.models.projector import ProjectorModel

__all__ = ["EncoderConfig", "encoder_model", "encoder_network", "refuse_absent_weights", "refuse_images"]


def refuse_images(config: EncoderConfig, *, image_shape: tuple[int, int, int]) -> None:
    """Raise InputError where the encoder cannot take images (Ch, H, W); its weights are not read."""
    feature_count(outline(config), image_shape, name=config.describe())


def encoder_model(config: EncoderConfig) -> ProjectorModel:
    """The configuration of its network: its weights identify it, wherever their file lies."""
    return ProjectorModel(encoder=config.model_copy(update={"weights": None, "sha256": None}))


def encoder_network(config: EncoderConfig, *, image_shape: tuple[int, int, int]) -> Network:
    """The encoder with the weights of its file; its penultimate layer gives features (B, D) of length 1.

    There is one class, and its logit is 0: an encoder knows none.

    Args:
        config: which encoder, with the file of its weights.
        image_shape: (Ch, H, W).

    Raises:
        InputError: no weights named, no such file, weights of another encoder, or images that it cannot take.
        DamagedDataError: another sha256 than asked for, or a file that cannot be read.
    """
    model = encoder_model(config)
    module = model.build(image_shape, 1)
    module.body.encoder.load_state_dict(open_encoder(config).state_dict())  # type: ignore[union-attr]
    torch.nn.init.zeros_(module.classifier.weight)
    torch.nn.init.zeros_(module.classifier.bias)
    facts = {"model": config.describe(), "seconds": 0.0, "peak_bytes": 0, "data": None, "epochs": 0}
    return Network(model, image_shape, 1, behind(config), module.state_dict(), facts)
