"""Public image encoders as `timm/NAME`, `torchvision/NAME` or `open_clip/NAME`, from local weight files.

An encoder turns images into features and is never trained; distill/labels/adapters.py adapts it by little. A set whose
labels are made online by one names it by its sha256 instead of holding it. Nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from distill.contracts import Preprocessing
from distill.errors import InputError, missing_extra
from distill.machine_paths import MachinePath
from distill.models.torchvision_models import (
    AUXILIARY,
    classifier_names,
    differences,
    last_linear,
    load_state,
    make_classifier,
    name_today,
)
from distill.registry import nearest
from distill.training.config import NonNegative, Positive, Strict

Channels = tuple[float, float, float]

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)

PROMPT = "a photo of a {}."
_PROMPTS_AT_ONCE = 256

# What a network may hold while it is made beyond the tensors of its file: parameters that are replaced, and a head.
_TIMES_THE_FILE = 2
_HEAD_NUMBERS = 1 << 23


class EncoderConfig(Strict):
    """Options of an encoder.

    - `name`: `timm/NAME` (a tag such as `resnet18.a1_in1k` chooses mean and std), `torchvision/NAME` or
      `open_clip/NAME`. OpenAI's weights are those of open_clip's names that end in `-quickgelu`.
    - `weights`: a safetensors file or a state dict (loaded with weights_only), checked against `sha256` where given;
      `sha256` alone, as a set's recipe has it, waits for the file's name. Names are the library's own; for timm's
      efficientnets also those of the packages efficientnet_pytorch and efficientnet_lite_pytorch. A classifier in the
      file is left out.
    - `size`: the side in px to which images are resized before the encoder; left out, they stay as they are.
    - `mean`, `std`: of each colour, in units of pixel value / 255; left out, what the library says of the weights.
    """

    name: Annotated[str, Field(pattern="^(timm|torchvision|open_clip)/.+")]
    weights: Annotated[str, Field(min_length=1), MachinePath(sha256="sha256")] | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    size: Annotated[int, Field(ge=8, le=1024)] | None = None
    mean: tuple[NonNegative, NonNegative, NonNegative] | None = None
    std: tuple[Positive, Positive, Positive] | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        library, _, own = name.partition("/")
        known = _LIBRARIES[library].names()
        if own not in known:
            close = nearest(own, known)
            hint = f"did you mean {f'{library}/{close}'!r}?" if close else f"it has {len(known)} others"
            raise ValueError(f"{library} has no encoder {own!r}; {hint}")
        return name

    def describe(self) -> str:
        """Short text that tells encoders apart, such as `open_clip/RN50` or `timm/resnet18 at 96 px`."""
        return self.name if self.size is None else f"{self.name} at {self.size} px"


class Encoder(nn.Module):
    """(B, 3, H, W), normalised by the mean and std that the weights expect -> features float32 (B, D).

    It is frozen, and in eval mode whatever mode is asked for: its statistics belong to its weights.

    Args:
        body: (B, 3, H, W) -> (B, ...), flattened to (B, D).
        size: the side in px to which images are resized first (bilinear, antialiased), None for as they are.
    """

    def __init__(self, body: nn.Module, *, size: int | None = None) -> None:
        super().__init__()
        self.body = body
        self.size = size
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None:
            x = F.interpolate(
                x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True
            )
        return self.body(x).flatten(1).float()


def refuse_absent_weights(config: EncoderConfig) -> None:
    """Raise InputError where the file of the encoder's weights is not there; costs nothing."""
    if config.weights is None or not Path(config.weights).is_file():
        raise InputError(
            f"the weights of the encoder {config.name} are not there",
            where="encoder.weights",
            found="no file named" if config.weights is None else f"{config.weights}: no such file",
            fix="download them yourself and name the file: weights are never downloaded here; a relative path "
            "starts at the current folder",
        )


def outline(config: EncoderConfig) -> Encoder:
    """The encoder's architecture on the CPU, with any weights; torch's global generator stays as it was.

    Raises:
        InputError: a network whose features cannot be told from its classifier.
    """
    library, name = _library(config)
    with torch.random.fork_rng(devices=[]):
        return Encoder(library.build(name), size=config.size)


def open_encoder(config: EncoderConfig) -> Encoder:
    """The encoder with the weights of its file, on the CPU.

    Raises:
        InputError: no weights named, no such file, or weights of another encoder.
        DamagedDataError: another sha256 than asked for, or a file that cannot be read.
    """
    path = _weights_file(config)
    state = _own(config, load_state(path, sha256=config.sha256), path=path)
    encoder = outline(config)
    _load(encoder.body, state, config=config, path=path)
    return encoder


def refuse_unusable(config: EncoderConfig, *, text: bool, templates: Sequence[str] = (PROMPT,)) -> None:
    """Refuse before long work what `open_encoder`, `behind` and `text_embeddings` would refuse behind it.

    The file is read and compared; no network is made that takes more memory than the file lets expect.

    Args:
        config: an encoder with a file of weights.
        text: whether classes will be embedded too.
        templates: prompts of `text_embeddings`.

    Raises:
        InputError: mean or std unknown, no weights named, no such file, or weights of another encoder; with `text`
            also an encoder without a usable text tower, or templates without `{}`.
        DamagedDataError: as for `open_encoder`.
    """
    behind(config)
    path = _weights_file(config)
    if text:
        _refuse_templates(templates)
        _text_towers(config)
        _tokenizer(config)
    state = load_state(path, sha256=config.sha256)
    _own(config, state, path=path)
    if text:
        _own_towers(config, state, path=path)


@torch.no_grad()
def feature_count(encoder: Encoder, image_shape: tuple[int, int, int], *, name: str) -> int:
    """D, by trying one black image (Ch, H, W): what sizes a network takes is written nowhere else.

    Raises:
        InputError: images that the encoder cannot take; `name` is what it is called then.
    """
    channels, height, width = image_shape
    if channels != 3:
        raise InputError(
            f"{name} takes RGB images",
            found=f"{channels} channel{'s' if channels != 1 else ''}",
            allowed="3 channels",
            fix="set data.channels to rgb",
        )
    device = next(encoder.parameters()).device
    try:
        return encoder(torch.zeros(1, *image_shape, device=device)).shape[1]
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"{name} cannot take images of {height} x {width} px",
            found=(str(error) or type(error).__name__).splitlines()[0],
            fix="set size in the encoder's options, to 224 for most",
        ) from error


def file_facts(config: EncoderConfig) -> tuple[str, int]:
    """sha256 (hex) and bytes of the weights file.

    Raises:
        InputError: no weights named, or no such file.
    """
    path = _weights_file(config)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
    except OSError as error:
        raise InputError(
            "cannot read the weights file",
            where=str(path),
            found=error.strerror,
            fix="correct weights in the encoder's options; a relative path starts at the current folder",
        ) from error


def behind(config: EncoderConfig) -> Preprocessing:
    """The mean and std that the encoder's weights expect of images.

    Raises:
        InputError: weights of this name expect different ones, and the configuration does not say which.
    """
    if config.mean is not None and config.std is not None:
        return Preprocessing(mean=config.mean, std=config.std)
    library, name = _library(config)
    mean, std = library.normalisation(name)
    return Preprocessing(mean=config.mean or mean, std=config.std or std)


@torch.no_grad()
def text_embeddings(
    config: EncoderConfig, classes: Sequence[str], *, templates: Sequence[str] = (PROMPT,)
) -> Tensor:
    """float32 (C, D) of length 1: of each class the mean of its prompts' embeddings, themselves of length 1.

    With features of length 1 they are a classifier (Radford et al., ICML 2021, section 3.1.4).

    Args:
        config: an encoder of open_clip with a text tower of its own.
        classes: their names.
        templates: prompts, in which `{}` stands for the class.

    Raises:
        InputError: an encoder without a usable text tower, no classes, or templates without `{}`; and what
            `open_encoder` refuses.
        DamagedDataError: as for `open_encoder`.
    """
    _refuse_prompts(classes, templates)
    path = _weights_file(config)
    make, tokenize = _text_towers(config), _tokenizer(config)
    state = _own_towers(config, load_state(path, sha256=config.sha256), path=path)
    with torch.random.fork_rng(devices=[]):
        model: Any = make().eval()
    _load(model, state, config=config, path=path)
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    embedded = [
        F.normalize(model.encode_text(tokenize(prompts[start : start + _PROMPTS_AT_ONCE])).float(), dim=1)
        for start in range(0, len(prompts), _PROMPTS_AT_ONCE)
    ]
    mean = torch.cat(embedded).view(len(classes), len(templates), -1).mean(dim=1)
    return F.normalize(mean, dim=1)


def _library(config: EncoderConfig) -> tuple[_Library, str]:
    library, _, name = config.name.partition("/")
    return _LIBRARIES[library], name


def _weights_file(config: EncoderConfig) -> Path:
    if config.weights is not None:
        return Path(config.weights)
    if config.sha256 is not None:
        raise InputError(
            f"the weights of {config.name} are known by their sha256 alone",
            where="weights",
            found=config.sha256,
            fix="name the file of this sha256 in weights, in the encoder's options",
        )
    raise InputError(
        f"{config.name} needs a file of weights",
        where="weights",
        found="none",
        fix="download it yourself and name the file in weights: weights are never downloaded here",
    )


def _own(config: EncoderConfig, state: dict[str, Tensor], *, path: Path) -> dict[str, Tensor]:
    """The file's tensors that are the encoder's, under its names; no others get by."""
    library, name = _library(config)
    wanted = _shapes(lambda: library.build(name), state, config=config, path=path)
    state = library.own(name, state, wanted)
    _refuse_others(state, wanted, config=config, path=path)
    return state


def _own_towers(config: EncoderConfig, state: dict[str, Tensor], *, path: Path) -> dict[str, Tensor]:
    """The file's tensors that are those of both towers; no others get by."""
    wanted = _shapes(_text_towers(config), state, config=config, path=path)
    state = _without_logit_scale(state)
    _refuse_others(state, wanted, config=config, path=path)
    return state


def _shapes(
    make: Callable[[], nn.Module], state: Mapping[str, Tensor], *, config: EncoderConfig, path: Path
) -> dict[str, Tensor]:
    """The state that a network will have, on the meta device.

    A set from a stranger names its encoder: the largest there is must cost nothing until the file is known to be its.
    """
    with _bounded(state, config=config, path=path):
        return {name: value.to("meta") for name, value in _sketch(make).state_dict().items()}


def _sketch(make: Callable[[], nn.Module]) -> nn.Module:
    """A network without numbers, on the meta device; with them where it cannot be made otherwise."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return make()
        except (RuntimeError, TypeError):
            # torchvision's regnets compute their widths as tensors and read them, and meta has nothing to read.
            return make()


@contextmanager
def _bounded(state: Mapping[str, Tensor], *, config: EncoderConfig, path: Path) -> Iterator[None]:
    """A network made here is given up once its parameters with memory are out of all proportion to the file's."""
    held = sum(value.numel() for value in state.values())
    most = _TIMES_THE_FILE * held + _HEAD_NUMBERS
    made = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += 0 if parameter is None or parameter.is_meta else parameter.numel()
        if made > most:
            raise _another_encoder(
                config, path, found=f"{held:,} numbers, where the encoder has more than {most:,}"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _load(module: nn.Module, state: Mapping[str, Tensor], *, config: EncoderConfig, path: Path) -> None:
    """Load the file's tensors, once every name and shape is as it should be."""
    _refuse_others(state, module.state_dict(), config=config, path=path)
    module.load_state_dict(_without_counts(state), strict=False)


def _refuse_others(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, config: EncoderConfig, path: Path
) -> None:
    """Refuse other names and shapes than those of `wanted`."""
    # What BatchNorm counts matters to training alone, and older files lack it. A scale of logits is no part of
    # either tower.
    wrong = differences(_without_counts(state), _without_logit_scale(_without_counts(wanted)))
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise _another_encoder(config, path, found="; ".join(wrong[:3]) + more)


def _another_encoder(config: EncoderConfig, path: Path, *, found: str) -> InputError:
    return InputError(
        f"the weights are for another encoder than {config.name}",
        where=str(path),
        found=found,
        fix="name the encoder that these weights belong to",
    )


def _without_counts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _without_logit_scale(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in ("logit_scale", "logit_bias")}


# --- what differs from library to library


class _Library(ABC):
    """Where encoders come from. Its package is imported when an encoder is asked for."""

    @abstractmethod
    def names(self) -> Collection[str]:
        """Every NAME."""

    @abstractmethod
    def build(self, name: str) -> nn.Module:
        """(B, 3, H, W) -> (B, D), its weights random."""

    @abstractmethod
    def normalisation(self, name: str) -> tuple[Channels, Channels]:
        """The mean and std that weights of this name expect."""

    @abstractmethod
    def own(self, name: str, state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors without those of other parts of the network, under the names of `wanted`."""


class _Timm(_Library):
    def names(self) -> Collection[str]:
        timm = _timm()
        return [*timm.list_models(), *timm.list_pretrained()]

    def build(self, name: str) -> nn.Module:
        return _timm().create_model(name, pretrained=False, num_classes=0)

    def normalisation(self, name: str) -> tuple[Channels, Channels]:
        facts = _timm().get_pretrained_cfg(name)
        if facts is None:
            raise _unknown_normalisation(f"timm knows no weights of {name}")
        return facts.mean, facts.std

    def own(self, name: str, state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "_conv_stem.weight" in state:
            return _in_order(_without(state, ("_fc.",)), wanted)
        facts = _timm().get_pretrained_cfg(name)
        heads = None if facts is None else facts.classifier
        paths = (heads,) if isinstance(heads, str) else heads or ()
        return _without(state, tuple(_head_prefix(path, wanted) for path in paths))


class _Torchvision(_Library):
    def names(self) -> Collection[str]:
        return classifier_names()

    def build(self, name: str) -> nn.Module:
        module = make_classifier(name, weighted=True)
        module.set_submodule(last_linear(module, f"torchvision/{name}"), nn.Identity())
        return module

    def normalisation(self, name: str) -> tuple[Channels, Channels]:
        return IMAGENET_MEAN, IMAGENET_STD

    def own(self, name: str, state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        head = last_linear(_sketch(partial(make_classifier, name, weighted=True)), f"torchvision/{name}")
        state = _without(state, (f"{head}.", *AUXILIARY.get(name, ())))
        return {name_today(each): value for each, value in state.items()}


class _OpenClip(_Library):
    def names(self) -> Collection[str]:
        return _open_clip().list_models()

    def build(self, name: str) -> nn.Module:
        described = _open_clip().get_model_config(name)
        # One vector an image, also where the whole model would be given the tokens beside it.
        vision = {**described["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False}
        # A tower comes with its twin, which is made as small as can be and dropped.
        text = {"width": 1, "heads": 1, "layers": 1, "vocab_size": 1, "context_length": 1}
        pair = _open_clip().CustomTextCLIP(
            described["embed_dim"], vision, text, quick_gelu=described.get("quick_gelu", False)
        )
        return pair.visual

    def normalisation(self, name: str) -> tuple[Channels, Channels]:
        library = _open_clip()
        tags = library.list_pretrained_tags_by_model(name)
        facts = [library.get_pretrained_cfg(name, tag) for tag in tags]
        told = {(tuple(each["mean"]), tuple(each["std"])) for each in facts}
        if len(told) > 1:
            raise _unknown_normalisation(f"the public weights of {name} expect different ones")
        return told.pop() if told else (library.OPENAI_DATASET_MEAN, library.OPENAI_DATASET_STD)

    def own(self, name: str, state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            each.removeprefix("visual."): value for each, value in state.items() if each.startswith("visual.")
        }


_LIBRARIES: dict[str, _Library] = {
    "timm": _Timm(),
    "torchvision": _Torchvision(),
    "open_clip": _OpenClip(),
}


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise missing_extra("timm", "clip", purpose="an encoder of timm") from None
    return timm


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError:
        raise missing_extra("open_clip_torch", "clip", purpose="an encoder of open_clip") from None
    return open_clip


def _unknown_normalisation(why: str) -> InputError:
    return InputError(
        f"nobody can tell the mean and std of these weights: {why}",
        where="mean",
        found="none",
        fix="set mean and std in the encoder's options to what the weights were trained with",
    )


def _without(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def _head_prefix(classifier: str, wanted: Mapping[str, Tensor]) -> str:
    """What names in the classifier begin with: all of `head.linear`'s `head.` where the encoder has nothing there."""
    root = classifier.partition(".")[0] + "."
    return f"{classifier}." if any(name.startswith(root) for name in wanted) else root


def _in_order(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of `wanted`, whose order is theirs, where count, kinds and shapes all agree.

    efficientnet_pytorch and timm name the same tensors differently and list them in the same order.
    """
    agree = len(state) == len(wanted) and all(
        own.rpartition(".")[2] == name.rpartition(".")[2] and state[own].shape == wanted[name].shape
        for own, name in zip(state, wanted, strict=True)
    )
    return dict(zip(wanted, state.values(), strict=True)) if agree else state


# --- text


def _refuse_prompts(classes: Sequence[str], templates: Sequence[str]) -> None:
    if not classes:
        raise InputError("there are no classes to embed", where="classes", found="none")
    _refuse_templates(templates)


def _refuse_templates(templates: Sequence[str]) -> None:
    odd = [each for each in templates if "{}" not in each]
    if odd or not templates:
        raise InputError(
            "a template is a prompt with {} where the class goes",
            where="templates",
            found=repr(odd[0]) if odd else "none",
            allowed=f"texts such as {PROMPT!r}",
        )


def _text_towers(config: EncoderConfig) -> Callable[[], nn.Module]:
    """What makes both towers, their weights random; an encoder without a usable text tower is refused."""
    library, _, name = config.name.partition("/")
    if library != "open_clip":
        raise InputError(
            f"{config.name} has no text tower",
            found=config.name,
            allowed="open_clip/NAME",
            fix="name an encoder of open_clip, or start the head from class means",
        )
    open_clip = _open_clip()
    described = open_clip.get_model_config(name)
    text = described["text_cfg"]
    if "hf_model_name" in text or "hf_tokenizer_name" in text:
        raise _unusable_text(config, "its text tower or tokenizer lies on the Hugging Face hub")
    if "multimodal_cfg" in described:
        raise _unusable_text(config, "its text tower writes captions")
    described["vision_cfg"]["timm_model_pretrained"] = False
    kind = open_clip.CustomTextCLIP if described.pop("custom_text", False) else open_clip.CLIP
    return partial(kind, **described)


def _tokenizer(config: EncoderConfig) -> Callable[[list[str]], Tensor]:
    """Prompts -> what `encode_text` takes; of an encoder that `_text_towers` accepts."""
    return _open_clip().get_tokenizer(config.name.partition("/")[2])


def _unusable_text(config: EncoderConfig, why: str) -> InputError:
    return InputError(
        f"{config.name} cannot embed text: {why}",
        found=config.name,
        allowed="encoders of open_clip with a text tower and tokenizer of their own, such as open_clip/RN50",
        fix="name one of these, or start the head from class means",
    )
