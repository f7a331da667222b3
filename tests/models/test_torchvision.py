"""torchvision's classifiers: class counts, weights from files, and everything that a file can get wrong."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from distill.errors import DamagedDataError, InputError
from distill.models import build, model_config
from distill.models.cost import forward_cost
from distill.models.torchvision_models import load_state

NAME = "torchvision/shufflenet_v2_x0_5"


def network(shape=(3, 32, 32), *, classes: int = 4, name: str = NAME, **options: Any) -> nn.Module:
    return build(model_config({"name": name, **options}), image_shape=shape, classes=classes, seed=0)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(3)
    return torchvision.models.get_model("shufflenet_v2_x0_5", weights=None, num_classes=4).eval()


@pytest.fixture
def weights(original: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    torch.save(original.state_dict(), path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refused(error: type[Exception], *parts: str, **options: Any) -> None:
    with pytest.raises(error) as caught:
        network(**options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_weights_give_the_original_network(original, tmp_path, ending) -> None:
    path = tmp_path / f"weights.{ending}"
    (save_file if ending == "safetensors" else torch.save)(original.state_dict(), path)
    module = network(weights=str(path), sha256=sha256(path)).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(module(x), original(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("torchvision/resnet18", "fc"),
        ("torchvision/mobilenet_v3_small", "classifier.3"),
        ("torchvision/mnasnet0_5", "classifier.1"),
    ],
)
def test_the_last_linear_layer_becomes_the_classifier(name, path) -> None:
    module = network(name=name)
    assert module.classifier.out_features == 4
    assert isinstance(module.body.get_submodule(path), nn.Identity)
    assert sum(isinstance(part, nn.Linear) and part.out_features == 1000 for part in module.modules()) == 0


def test_auxiliary_heads_are_left_out(tmp_path) -> None:
    """Also those of a file; googlenet has two, and two linear layers in each."""
    full = torchvision.models.GoogLeNet(
        num_classes=4, aux_logits=True, init_weights=False, transform_input=True
    ).eval()
    path = tmp_path / "googlenet.pt"
    torch.save(full.state_dict(), path)
    module = network(name="torchvision/googlenet", weights=str(path)).train()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert module(x).shape == (2, 4)
    module = network(name="torchvision/googlenet", weights=str(path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(module(x), full(x), rtol=1e-4, atol=1e-6)


def test_thousand_classes_need_no_new_layer() -> None:
    assert network(classes=1000).classifier.out_features == 1000


def test_grayscale_images() -> None:
    refused(InputError, "takes RGB images", "1 channel", "set data.channels to rgb", shape=(1, 32, 32))


def test_images_of_a_wrong_size() -> None:
    name = "torchvision/alexnet"
    refused(InputError, f"{name} cannot take images of 32 x 32 px", "data.resize", name=name)


def test_no_final_linear_layer() -> None:
    refused(InputError, "no final linear layer", name="torchvision/squeezenet1_1", shape=(3, 64, 64))


def test_missing_file(tmp_path) -> None:
    refused(
        InputError,
        "cannot read the weights file",
        "none.pt",
        "No such file",
        weights=str(tmp_path / "none.pt"),
    )


def test_a_folder_instead_of_a_file(tmp_path) -> None:
    refused(InputError, "cannot read the weights file", "directory", weights=str(tmp_path))


def test_sha256_without_a_file_is_not_built_from_random_weights() -> None:
    refused(InputError, "known by their sha256 alone", "0" * 64, "weights", sha256="0" * 64)


def test_wrong_sha256(weights) -> None:
    refused(
        DamagedDataError, "another sha256", sha256(weights), "0" * 64, weights=str(weights), sha256="0" * 64
    )


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", None], ids=["empty", "text", "truncated"])
def test_damaged_files(weights, tmp_path, original, ending, content) -> None:
    path = tmp_path / f"damaged.{ending}"
    if content is None:
        (save_file if ending == "safetensors" else torch.save)(original.state_dict(), path)
        content = path.read_bytes()[:1000]
    path.write_bytes(content)
    refused(DamagedDataError, "not a s", str(path), weights=str(path))


def test_code_in_a_pickle_is_never_run(tmp_path) -> None:
    path, witness = tmp_path / "hostile.pt", tmp_path / "witness"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (witness,)

    torch.save({"fc.weight": Hostile()}, path)
    refused(DamagedDataError, "weights_only", weights=str(path))
    assert not witness.exists()


@pytest.mark.parametrize("content", [[1, 2], {"fc.weight": 3}, {3: torch.zeros(2)}, torch.zeros(3)])
def test_a_file_without_a_state_dict(tmp_path, content) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    refused(InputError, "holds no state dict", "state_dict()", weights=str(path))


def test_weights_of_another_network(tmp_path) -> None:
    path = tmp_path / "mlp.pt"
    torch.save(nn.Linear(3, 4).state_dict(), path)
    refused(InputError, "for another network", "conv1.0.weight is missing", "; and ", weights=str(path))


def test_weights_with_a_surplus_name_or_another_shape(original, tmp_path) -> None:
    path = tmp_path / "odd.pt"
    state = {**original.state_dict(), "head.weight": torch.zeros(1)}
    state["conv1.0.weight"] = torch.zeros(1, 3, 3, 3)
    torch.save(state, path)
    refused(
        InputError,
        "head.weight is unknown; conv1.0.weight is (1, 3, 3, 3) instead of (24, 3, 3, 3)",
        weights=str(path),
    )


def test_weights_for_another_number_of_classes(weights) -> None:
    refused(
        InputError, "another number of classes", "4 classes", "7, the data's", weights=str(weights), classes=7
    )


def test_without_safetensors_the_error_names_the_extra(tmp_path, monkeypatch) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(InputError, "safetensors", "pip install 'distill[weights]'", weights=str(path))


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("resnet18", 16),
        ("shufflenet_v2_x0_5", 16),
        ("densenet121", 16),
        ("mobilenet_v2", 4),
        ("regnet_y_400mf", 4),
    ],
)
def test_a_small_stem_keeps_small_images_whole(name: str, pixels: int) -> None:
    """What reaches the last stage: two stages less are strided away, one where no pooling follows the stem."""
    config = model_config({"name": f"torchvision/{name}", "stem": "small"})
    assert config.describe() == f"torchvision/{name}-small"
    module = build(config, image_shape=(3, 32, 32), classes=4, seed=0).eval()
    seen = []
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda _, __, output: seen.append(output.shape[2] * output.shape[3]))
    with torch.no_grad():
        assert module(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    assert seen[0] == 32 * 32 and max(seen[-3:]) == pixels
    assert forward_cost(config, (3, 32, 32), 4).flops > 0


def test_a_stem_that_is_small_already_is_refused() -> None:
    with pytest.raises(InputError, match="vgg11 has stride 1"):
        network(name="torchvision/vgg11", stem="small")


def test_files_of_densenets_with_names_from_before_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    now = torchvision.models.densenet121(weights=None, num_classes=4).eval()
    before = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", name): value
        for name, value in now.state_dict().items()
    }
    assert before.keys() != now.state_dict().keys()
    torch.save(before, tmp_path / "densenet121.pth")
    read = network(name="torchvision/densenet121", weights=str(tmp_path / "densenet121.pth")).eval()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(read(image), now(image))


@pytest.mark.parametrize("kind", ["repeated", "meta"])
def test_a_file_that_claims_more_than_it_holds_is_damage(kind: str, tmp_path: Path) -> None:
    """A tensor of stride 0, or without memory, has any shape in a few bytes."""
    shape = (1 << 12, 1 << 12)
    value = torch.zeros(1).expand(shape) if kind == "repeated" else torch.empty(shape, device="meta")
    torch.save({"weight": value}, tmp_path / "weights.pt")
    with pytest.raises(DamagedDataError, match="less than its tensors say"):
        load_state(tmp_path / "weights.pt", sha256=None)
