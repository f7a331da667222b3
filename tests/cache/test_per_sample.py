"""Per-sample gradients of whole networks against one backward pass a sample, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from distill.cache.per_sample import MAX_ROWS, GradientPass, GradientRequest, _ByLayer, _InGeneral
from distill.cache.projections import Projection, Projector
from distill.errors import InputError
from distill.models import build, model_config

ROWS, CLASSES = 5, 3
PLENTY = 1 << 30

Shape = tuple[int, int, int]


class Twice(nn.Module):
    """One linear layer called twice, on vectors and then on tokens, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, stride=2, groups=2)
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.unused = nn.Linear(4, 4)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x).flatten(2).transpose(1, 2)
        tokens = self.norm(F.gelu(self.linear(tokens)))
        return self.last(F.relu(self.linear(tokens.mean(dim=1))))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1))))))


class Folded(nn.Module):
    """A layer that sees tokens as if they were samples, and a free parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))
        self.token = nn.Linear(4, 4)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 4) + self.shift
        return self.last(torch.tanh(self.token(tokens)).reshape(len(x), 8))


def named(config: Any, shape: Shape) -> Callable[[], tuple[nn.Module, Shape]]:
    return lambda: (
        build(model_config(config), image_shape=shape, classes=CLASSES, seed=1),
        shape,
    )


def vit() -> nn.Module:
    return VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        num_classes=CLASSES,
    )


def swin() -> nn.Module:
    return SwinTransformer(
        patch_size=[2, 2],
        embed_dim=4,
        depths=[2],
        num_heads=[2],
        window_size=[2, 2],
        num_classes=CLASSES,
        stochastic_depth_prob=0.0,
    )


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Shape]]] = {
    "convnet": named({"name": "convnet", "width": 4}, (2, 8, 8)),
    "convnet_odd": named({"name": "convnet", "width": 4, "depth": 2}, (1, 10, 11)),
    "convnet_batch": named({"name": "convnet", "width": 4, "norm": "batch"}, (2, 8, 8)),
    "convnet_none": named({"name": "convnet", "width": 4, "norm": "none"}, (2, 8, 8)),
    "mlp": named({"name": "mlp", "width": 6}, (2, 4, 4)),
    "resnet18": named({"name": "resnet18", "width": 2}, (2, 8, 8)),
    "resnet18_instance": named({"name": "resnet18", "width": 2, "norm": "instance"}, (2, 16, 16)),
    "twice": lambda: (Twice(), (2, 8, 8)),
    "tied": lambda: (Tied(), (1, 2, 4)),
    "folded": lambda: (Folded(), (1, 2, 4)),
    "vit": lambda: (vit(), (3, 8, 8)),
    "swin": lambda: (swin(), (3, 8, 8)),
}
IN_GENERAL = {"twice", "tied", "folded", "vit", "swin"}  # for some of their parameters


def network(name: str, *, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Shape]:
    """In evaluation mode and channels_last; no parameter and no statistic is at its first value."""
    module, shape = NETWORKS[name]()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator) * 0.4
                value.copy_(noise + 0.5 if "running_var" in key else value + noise - 0.2)
    return module.eval().to(dtype=dtype, memory_format=torch.channels_last), shape  # type: ignore[call-overload]


def data(shape: Shape, *, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(rows, *shape, generator=generator, dtype=dtype)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return images.contiguous(memory_format=torch.channels_last), labels


def one_by_one(module: nn.Module, images: Tensor, labels: Tensor, of: str) -> dict[str, Tensor]:
    """(B, *shape) of every parameter: a backward pass for each sample, in plain memory, through torch's own layers."""
    module, images = copy.deepcopy(module).to(memory_format=torch.contiguous_format), images.contiguous()  # type: ignore[call-overload]
    own = dict(module.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in own}
    for image, label in zip(images, labels, strict=True):
        logits = module(image[None])[0]
        if of == "loss":
            output = -logits.log_softmax(0)[label]
        else:
            others = torch.cat([logits[:label], logits[label + 1 :]])
            output = logits[label] - others.logsumexp(0)
        parts = torch.autograd.grad(output, list(own.values()), allow_unused=True)
        for name, part in zip(own, parts, strict=True):
            rows[name].append(torch.zeros_like(own[name]) if part is None else part)
    return {name: torch.stack(parts) for name, parts in rows.items()}


def projected(parts: dict[str, Tensor], projection: Projection) -> Tensor:
    """(B, k) through the explicit matrix of each tensor."""
    projector = Projector(projection)
    total = torch.zeros(ROWS, projection.dim, dtype=torch.float64)
    for name, values in parts.items():
        count = values[0].numel()
        matrix = torch.zeros(count, projection.dim, dtype=torch.float64)
        units = torch.eye(count, dtype=torch.float64).view(count, *values.shape[1:])
        projector.add(matrix, name, units)
        total += values.flatten(1) @ matrix
    return total


def lengths(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([values.flatten(1) for values in parts.values()], dim=1).norm(dim=1)


def answers(
    module: nn.Module, shape: Shape, requests: Sequence[GradientRequest], *, work_bytes: int = PLENTY
) -> dict[GradientRequest, Tensor]:
    images, labels = data(shape, dtype=next(module.parameters()).dtype)
    return GradientPass(module, requests, image_shape=shape, work_bytes=work_bytes).run(images, labels)[1]


def close(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11 * scale)


@pytest.mark.parametrize("of", ["loss", "margin"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_one_backward_pass_a_sample(name: str, of: Any) -> None:
    module, shape = network(name)
    projections = [Projection(kind=kind, dim=4, seed=7) for kind in ("kronecker", "sparse")]
    requests = [
        GradientRequest(of=of),
        *(GradientRequest(of=of, projection=projection) for projection in projections),
    ]
    found = answers(module, shape, requests)
    parts = one_by_one(module, *data(shape), of)
    close(found[requests[0]], lengths(parts))
    for request, projection in zip(requests[1:], projections, strict=True):
        close(found[request], projected(parts, projection))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_known_layers_go_forward_once(name: str) -> None:
    module, shape = network(name)
    own = GradientPass(module, [GradientRequest()], image_shape=shape, work_bytes=PLENTY)
    assert own.shares_forward == (name not in IN_GENERAL)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", ["convnet", "convnet_batch", "convnet_none", "mlp", "resnet18"])
def test_a_shared_forward_is_a_plain_one_bit_for_bit(name: str, memory_format: torch.memory_format) -> None:
    module, shape = network(name, dtype=torch.float32)
    images, labels = data(shape, rows=37, dtype=torch.float32)
    images = images.contiguous(memory_format=memory_format)
    seen: list[Tensor] = []
    hook = next(module.children()).register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    own = GradientPass(
        module,
        [GradientRequest(), GradientRequest(of="margin", projection=Projection(dim=8))],
        image_shape=shape,
        work_bytes=PLENTY,
    )
    with torch.no_grad():
        expected = module(images)
    plain = seen[-1].clone()
    seen.clear()
    logits, _ = own.run(images, labels)
    hook.remove()
    assert logits is not None and not logits.requires_grad
    assert torch.equal(logits, expected)
    assert len(seen) == 1 and torch.equal(seen[0], plain)


def test_a_pass_leaves_no_trace() -> None:
    module, shape = network("convnet")
    module.body[0].weight.requires_grad_(False)
    before = {name: (value.requires_grad, value.clone()) for name, value in module.named_parameters()}
    answers(module, shape, [GradientRequest()])
    for name, value in module.named_parameters():
        assert value.grad is None
        assert value.requires_grad == before[name][0]
        assert torch.equal(value, before[name][1])
    assert not any(part._forward_hooks for part in module.modules())


@pytest.mark.parametrize("name", ["convnet", "vit"])
def test_frozen_networks_and_those_without_grad_mode_give_the_same(name: str) -> None:
    module, shape = network(name)
    request = GradientRequest(projection=Projection(dim=8))
    trainable = answers(module, shape, [request])[request]
    with torch.no_grad():
        assert torch.equal(answers(module.requires_grad_(False), shape, [request])[request], trainable)


@pytest.mark.parametrize("name", ["convnet", "resnet18", "mlp", "vit"])
def test_how_much_goes_through_at_once_does_not_matter(name: str) -> None:
    module, shape = network(name)
    requests = [GradientRequest(), GradientRequest(projection=Projection(dim=8))]
    expected = answers(module, shape, requests)
    for work_bytes in (0, 50_000):
        own = GradientPass(module, requests, image_shape=shape, work_bytes=work_bytes)
        assert not own.shares_forward
        logits, found = own.run(*data(shape))
        assert logits is None
        for request in requests:
            close(found[request], expected[request])


@pytest.mark.parametrize("name", ["convnet", "vit"])
def test_work_bytes_bound_the_rows(name: str) -> None:
    module, shape = network(name)

    def rows(work_bytes: int) -> int:
        own = GradientPass(module, [GradientRequest()], image_shape=shape, work_bytes=work_bytes)
        return own._ways[0].rows

    assert rows(0) == 1
    assert rows(PLENTY) == MAX_ROWS
    found = [rows(1 << power) for power in range(10, 30)]
    assert found == sorted(found) and {2, 4, 8} < set(found)


@pytest.mark.parametrize("work_bytes", [100_000, PLENTY])
@pytest.mark.parametrize("name", ["convnet", "vit"])
def test_the_same_again_whatever_else_is_asked_for(name: str, work_bytes: int) -> None:
    module, shape = network(name, dtype=torch.float32)
    request = GradientRequest(projection=Projection(dim=16))
    last = "classifier" if name == "convnet" else "heads"
    others = [GradientRequest(layers=(last,)), GradientRequest(of="margin"), GradientRequest()]
    alone = answers(module, shape, [request], work_bytes=work_bytes)[request]
    beside = answers(module, shape, [*others, request], work_bytes=work_bytes)[request]
    assert alone.dtype == torch.float32 and alone.shape == (ROWS, 16)
    assert torch.equal(alone, beside)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("*",), None),
        (("classifier",), ["classifier.weight", "classifier.bias"]),
        (("classifier.bias",), ["classifier.bias"]),
        (("body.0.weight", "c*.bias"), ["body.0.weight", "classifier.bias"]),
        (("body",), [f"body.{part}.{end}" for part in range(4) for end in ("weight", "bias")]),
        (("body.[12].weight",), ["body.1.weight", "body.2.weight"]),
    ],
)  # fmt: skip
def test_patterns_choose_parameters(patterns: tuple[str, ...], expected: list[str] | None) -> None:
    module, shape = network("convnet")
    request = GradientRequest(layers=patterns)
    projection = Projection(dim=8)
    asked = GradientRequest(layers=patterns, projection=projection)
    found = answers(module, shape, [request, asked])
    parts = one_by_one(module, *data(shape), "loss")
    chosen = {name: values for name, values in parts.items() if expected is None or name in expected}
    assert expected is None or len(chosen) == len(expected)
    close(found[request], lengths(chosen))
    close(found[asked], projected(chosen, projection))


def test_layers_with_a_closed_form_are_enough_for_their_own_requests() -> None:
    """Attention stays out of it: the patches' convolution and the tokens' layers go by one pass."""
    module, shape = network("vit")
    request = GradientRequest(layers=("conv_proj", "*.mlp", "*.ln_2"))
    general = GradientRequest(layers=("*.self_attention",))
    own = GradientPass(module, [request, general], image_shape=shape, work_bytes=PLENTY)
    assert not own.shares_forward  # vmap calls the module too
    found = own.run(*data(shape))[1]
    parts = one_by_one(module, *data(shape), "loss")
    of_layers = {name: parts[name] for name in parts if "attention" not in name}
    close(
        found[request],
        lengths(
            {n: v for n, v in of_layers.items() if any(part in n for part in ("conv_proj", "mlp", "ln_2"))}
        ),
    )
    close(found[general], lengths({n: v for n, v in parts.items() if "attention" in n}))


def test_one_layer_without_a_closed_form_does_not_send_others_to_vmap() -> None:
    module, shape = network("vit")
    own = GradientPass(module, [GradientRequest()], image_shape=shape, work_bytes=PLENTY)
    by_layer, in_general = own._ways
    assert isinstance(by_layer, _ByLayer) and isinstance(in_general, _InGeneral)
    names = dict(module.named_parameters())
    general = set(in_general._pass.parameters)
    assert general == {
        name for name in names if "attention" in name or name in ("class_token", "encoder.pos_embedding")
    }
    assert set().union(*(answer.names for answer in by_layer.answers)) == set(names) - general


@pytest.mark.parametrize("name", ["resnet18", "vit", "mlp"])
def test_the_way_is_no_part_of_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late convolutions and wide layers go through factors; their formed gradients give the same."""
    module, shape = network(name)
    request = GradientRequest(projection=Projection(kind="kronecker", dim=2))
    used: list[int] = []
    add_outer = Projector.add_outer

    def counted(self: Projector, out: Tensor, name: str, left: Tensor, right: Tensor) -> None:
        used.append(left.shape[2] * right.shape[2])
        add_outer(self, out, name, left, right)

    monkeypatch.setattr(Projector, "add_outer", counted)
    factored = answers(module, shape, [request])[request]
    assert sum(used) > sum(value.numel() for value in module.parameters()) // 3
    used.clear()
    monkeypatch.setattr(Projector, "takes_factors", lambda *_, **__: False)
    formed = answers(module, shape, [request])[request]
    assert not used
    close(formed, factored)
    close(answers(module, shape, [request], work_bytes=1000)[request], factored)


def test_labels_decide() -> None:
    module, shape = network("convnet")
    images, labels = data(shape)
    own = GradientPass(module, [request := GradientRequest()], image_shape=shape, work_bytes=PLENTY)
    first, second = (own.run(images, each)[1][request] for each in (labels, (labels + 1) % CLASSES))
    assert bool((first != second).all())


def test_the_last_layers_gradient_is_its_closed_form() -> None:
    """|softmax(z) - onehot(y)| * sqrt(|f|^2 + 1), f the features."""
    module, shape = network("convnet")
    images, labels = data(shape)
    request = GradientRequest(layers=("classifier",))
    found = answers(module, shape, [request])[request]
    with torch.no_grad():
        residual = module(images).softmax(1) - F.one_hot(labels, CLASSES)
        close(found, residual.norm(dim=1) * (module.features(images).square().sum(1) + 1).sqrt())


def test_an_empty_block_has_empty_answers() -> None:
    module, shape = network("convnet")
    request = GradientRequest(projection=Projection(dim=8))
    own = GradientPass(module, [request], image_shape=shape, work_bytes=0)
    images, labels = data(shape)
    assert own.run(images[:0], labels[:0])[1][request].shape == (0, 8)


def test_a_pattern_that_fits_nothing_is_refused_with_the_names() -> None:
    module, shape = network("convnet")
    with pytest.raises(InputError, match="clasifier") as caught:
        GradientPass(
            module, [GradientRequest(layers=("*", "clasifier"))], image_shape=shape, work_bytes=PLENTY
        )
    assert caught.value.found == "clasifier"
    assert caught.value.allowed is not None and "body.0.weight" in caught.value.allowed
    assert caught.value.fix is not None and "'classifier'" in caught.value.fix
    with pytest.raises(InputError, match="no parameters"):
        GradientPass(module, [GradientRequest(layers=())], image_shape=shape, work_bytes=PLENTY)


def test_margins_of_one_class_are_refused() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(8, 1)).eval()
    with pytest.raises(InputError, match="margin"):
        GradientPass(module, [GradientRequest(of="margin")], image_shape=(1, 2, 4), work_bytes=PLENTY)
    loss = GradientPass(module, [request := GradientRequest()], image_shape=(1, 2, 4), work_bytes=PLENTY)
    found = loss.run(torch.randn(3, 1, 2, 4), torch.zeros(3, dtype=torch.int64))[1][request]
    assert torch.equal(found, torch.zeros(3))


def test_a_network_in_training_is_our_own_mistake() -> None:
    module, shape = network("convnet_batch")
    with pytest.raises(AssertionError):
        GradientPass(module.train(), [GradientRequest()], image_shape=shape, work_bytes=PLENTY)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["convnet", "resnet18", "vit"])
def test_a_gpu_gives_what_a_cpu_gives(name: str) -> None:
    module, shape = network(name)
    requests = [GradientRequest(), GradientRequest(projection=Projection(dim=16))]
    expected = answers(module, shape, requests)
    own = GradientPass(module.cuda(), requests, image_shape=shape, work_bytes=PLENTY)
    images, labels = data(shape)
    found = own.run(images.cuda(), labels.cuda())[1]
    for request in requests:
        torch.testing.assert_close(found[request].cpu(), expected[request], rtol=1e-8, atol=1e-10)
