"""An outline has the splits that `open_source` would cut, for every option that decides them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import config_class, open_source, plan
from distill.data.outline import outline
from distill.errors import InputError
from distill.progress import NullProgress


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Three classes of 5, 7 and 9 small images."""
    for number, count in enumerate((5, 7, 9)):
        place = tmp_path / "images" / f"class-{number}"
        place.mkdir(parents=True)
        for image in range(count):
            Image.fromarray(np.full((6, 4, 3), 20 * image, dtype=np.uint8)).save(place / f"{image}.png")
    return str(tmp_path / "images")


OPTIONS: list[dict[str, Any]] = [
    {},
    {"cap": 4},
    {"valid": 0.0},
    {"valid": 0.4, "cap": 5},
    {"classes": [2, 0]},
    {"resize": 3, "channels": "grayscale"},
]


@pytest.mark.parametrize("name", ["digits", "folder"])
@pytest.mark.parametrize("options", OPTIONS, ids=[str(options) for options in OPTIONS])
@pytest.mark.parametrize("seed", [0, 5])
def test_an_outline_has_the_labels_of_the_source(
    name: str, options: dict[str, Any], seed: int, folder: str
) -> None:
    own = {"folder": folder} if name == "folder" else {}
    config = config_class(name).model_validate({**own, **options})
    found = outline(config, plan(config), seed=seed)
    source = open_source(config, seed=seed, progress=NullProgress())
    assert found is not None
    assert (found.classes, found.image_shape, found.notes) == (
        source.classes,
        source.image_shape,
        source.notes,
    )
    for part in ("train", "valid", "test"):
        assert torch.equal(getattr(found, part).labels, getattr(source, part).labels)
        assert getattr(found, part).images.shape == getattr(source, part).images.shape


def test_what_a_run_refuses_is_refused() -> None:
    config = config_class("digits").model_validate({"cap": 1, "valid": 0.9})
    with pytest.raises(InputError, match="no training image"):
        outline(config, plan(config), seed=0)


def test_nothing_is_downloaded_or_written(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        config = config_class("mnist").model_validate({"folder": str(folder)})
        assert outline(config, plan(config), seed=0) is None
    assert list(tmp_path.iterdir()) == []


def test_data_too_large_for_a_look_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data.outline.MAX_READ_BYTES", 1000)
    config = config_class("digits")()
    assert outline(config, plan(config), seed=0) is None
