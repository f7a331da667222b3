"""Low-rank adapters: what they compute, where gradients go, what is stored, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from distill.errors import DamagedDataError, InputError, NonFiniteError
from distill.labels.adapters import Ranks, attach, merge, pack, parameters, ranks_of, unpack

ABOUT = {"encoder": "timm/some", "sha256": "00ff"}


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, groups=4, bias=False),
            nn.Flatten(),
            nn.Sequential(nn.Linear(12 * 4, 20), nn.ReLU(), nn.Linear(20, 5)),
        ).eval()


CONVS, LINEARS = ("0", "3"), ("5.0", "5.2")


def adapted(ranks: Ranks | None = None, *, seed: int = 3, moved: bool = True) -> nn.Sequential:
    """With matrices as training might leave them."""
    module = network()
    attach(module, ranks or Ranks(conv=2, linear=3), seed=seed)
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for matrix in parameters(module):
                matrix += torch.randn(matrix.shape, generator=generator) * 0.1
    return module


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(2)).to(dtype)


def adapter(module: nn.Module, layer: str) -> Any:
    return module.get_submodule(layer).parametrizations["weight"][0]


def adapted_layers(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if hasattr(part, "parametrizations")]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {layer: module.get_submodule(layer).weight.detach() for layer in (*CONVS, *LINEARS)}


def refused(error: type[Exception], *parts: str, module: nn.Module, data: bytes) -> None:
    before = [matrix.detach().clone() for matrix in parameters(module)]
    with pytest.raises(error) as caught:
        unpack(module, data, about=ABOUT)
    for part in parts:
        assert part in str(caught.value)
    assert all(torch.equal(one, other) for one, other in zip(before, parameters(module), strict=True))


# --- what they compute


def test_a_network_begins_as_it_was() -> None:
    assert torch.equal(adapted(moved=False)(images()), network()(images()))


def test_weights_are_w_plus_b_times_a() -> None:
    """Against loops over every number, in float64; convolutions with and without groups."""
    module, original = adapted().double(), network().double()
    for layer, weight in weights(module).items():
        B, A = (adapter(module, layer).B, adapter(module, layer).A)
        wanted = original.get_submodule(layer).weight.detach().clone()
        rows = wanted.view(len(wanted), -1)
        for row in range(B.shape[0]):
            for column in range(A.shape[1]):
                rows[row, column] += sum(B[row, r] * A[r, column] for r in range(A.shape[0])).item()
        torch.testing.assert_close(weight, wanted, rtol=1e-12, atol=1e-12)
        original.get_submodule(layer).weight.data = wanted
    x = images(torch.float64)
    torch.testing.assert_close(module(x), original(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("learn_down", [True, False])
def test_gradients_reach_the_matrices_alone(learn_down) -> None:
    module = adapted(Ranks(conv=2, linear=3, learn_down=learn_down))
    module(images()).square().sum().backward()
    reached = {name for name, value in module.named_parameters() if value.grad is not None}
    kinds = ["A", "B"] if learn_down else ["B"]
    assert reached == {
        f"{layer}.parametrizations.weight.0.{kind}" for layer in (*CONVS, *LINEARS) for kind in kinds
    }
    assert len(parameters(module)) == len(reached)
    assert all(value.grad is not None and value.grad.any() for value in parameters(module))


def test_a_is_normal_with_variance_one_over_columns() -> None:
    module = nn.Sequential(nn.Linear(400, 500))
    attach(module, Ranks(conv=0, linear=100), seed=0)
    A = adapter(module, "0").A.detach().double() * 400**0.5
    assert A.shape == (100, 400)
    assert abs(A.mean()) < 4 / 200  # four standard errors of 40,000 draws
    assert abs(A.var() - 1) < 4 * (2 / 40_000) ** 0.5
    assert abs((A.abs() < 1).double().mean() - 0.682689) < 4 * (0.2166 / 40_000) ** 0.5


def test_a_follows_from_the_seed_and_the_layer_and_nothing_else() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = adapted(moved=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    two, other = adapted(Ranks(conv=2, linear=3, layers=("5",)), moved=False), adapted(seed=4, moved=False)
    assert torch.equal(adapter(one, "5.0").A, adapter(two, "5.0").A)
    assert not torch.equal(adapter(one, "5.0").A, adapter(other, "5.0").A)
    same_shape = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    attach(same_shape, Ranks(conv=0, linear=2), seed=0)
    assert not torch.equal(adapter(same_shape, "0").A, adapter(same_shape, "1").A)


def test_known_numbers_of_a() -> None:
    """A set that does not store A rests on these."""
    module = nn.Sequential(nn.Linear(4, 6))
    attach(module, Ranks(conv=0, linear=1, learn_down=False), seed=0)
    wanted = torch.tensor([[0.1370977312, 0.4474494457, 0.7744255066, -0.3383759558]])
    assert torch.equal(adapter(module, "0").A, wanted)


# --- which layers, and how large


@pytest.mark.parametrize(
    ("ranks", "layers"),
    [
        (Ranks(conv=1, linear=1), [*CONVS, *LINEARS]),
        (Ranks(conv=1, linear=0), [*CONVS]),
        (Ranks(conv=0, linear=1), [*LINEARS]),
        (Ranks(conv=1, linear=1, layers=("5",)), [*LINEARS]),
        (Ranks(conv=1, linear=1, layers=("5.2", "0")), ["0", "5.2"]),
        (Ranks(conv=1, linear=1, layers=("*.0",)), ["5.0"]),
    ],
)
def test_patterns_and_kinds_choose_the_layers(ranks, layers) -> None:
    assert adapted_layers(adapted(ranks)) == layers


@pytest.mark.parametrize(("out", "inside", "rank"), [(8, 36, 6), (3, 3, 1), (1, 5, 1), (20, 48, 14)])
def test_ranks_are_capped_where_two_matrices_would_be_no_smaller(out, inside, rank) -> None:
    module = nn.Sequential(nn.Linear(inside, out))
    attach(module, Ranks(conv=0, linear=1000), seed=0)
    found = len(adapter(module, "0").A)
    assert found == rank
    assert found == 1 or found * (out + inside) < out * inside <= (found + 1) * (out + inside)


@pytest.mark.parametrize(("out", "inside", "rank"), [(8, 36, 35), (36, 8, 7), (5, 1, 1), (1, 5, 4)])
def test_ranks_are_capped_where_b_alone_would_be_no_smaller(out, inside, rank) -> None:
    """A is not stored, and its size is no matter."""
    module = nn.Sequential(nn.Linear(inside, out))
    attach(module, Ranks(conv=0, linear=1000, learn_down=False), seed=0)
    found = adapter(module, "0").B.shape[1]
    assert found == rank
    assert found == 1 or out * found < out * inside <= out * (found + 1)


@pytest.mark.parametrize("learn_down", [True, False])
def test_ranks_below_the_cap_stay(learn_down) -> None:
    module = adapted(Ranks(conv=2, linear=3, learn_down=learn_down))
    assert ranks_of(module) == {"0": 2, "3": 2, "5.0": 3, "5.2": 3}


@pytest.mark.parametrize(
    ("learn_down", "wanted"),
    [(True, {"0": 6, "3": 7, "5.0": 14, "5.2": 3}), (False, {"0": 35, "3": 17, "5.0": 47, "5.2": 19})],
)
def test_ranks_that_were_cut_are_told(learn_down, wanted) -> None:
    module = adapted(Ranks(conv=1000, linear=1000, learn_down=learn_down))
    assert ranks_of(module) == wanted
    assert all(adapter(module, layer).B.shape[1] == rank for layer, rank in wanted.items())
    assert all(adapter(module, layer).A.shape[0] == rank for layer, rank in wanted.items())


def test_a_network_without_adapters_has_no_ranks() -> None:
    assert ranks_of(network()) == {}


def test_a_layer_alone() -> None:
    module = nn.Linear(6, 4)
    attach(module, Ranks(conv=0, linear=1), seed=0)
    assert unpack(module, pack(module, about=ABOUT), about=ABOUT) == {}


def test_attention_keeps_working() -> None:
    """Its projection of inputs is no linear layer, its projection of outputs is one."""
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    before = module(x, x, x)[0]
    attach(module, Ranks(conv=0, linear=1), seed=0)
    with torch.no_grad():
        assert torch.equal(module(x, x, x)[0], before)
        adapter(module, "out_proj").B += 1
        assert not torch.equal(module(x, x, x)[0], before)
    assert adapted_layers(module) == ["out_proj"]


@pytest.mark.parametrize(
    ("ranks", "parts"),
    [
        (Ranks(conv=1, linear=1, layers=("5", "5.9")), ["'5.9'", "patterns for 0, 3, 5.0, 5.2"]),
        (Ranks(conv=0, linear=1, layers=("0",)), ["'0'", "patterns for 5.0, 5.2"]),
        (Ranks(conv=0, linear=0), ["rank above 0", "raise the rank of its kind of layers"]),
        (Ranks(conv=1, linear=1, layers=()), ["no layers are named"]),
    ],
)
def test_patterns_that_fit_nothing(ranks, parts) -> None:
    module = network()
    with pytest.raises(InputError) as caught:
        attach(module, ranks, seed=0)
    for part in parts:
        assert part in str(caught.value)
    assert adapted_layers(module) == []
    assert all(value.requires_grad for value in module.parameters())


@pytest.mark.parametrize("rank", [-1, 1.5, True, "8"])
def test_wrong_ranks(rank) -> None:
    with pytest.raises(InputError, match="conv: a rank is a whole number"):
        Ranks(conv=rank, linear=1)


def test_one_text_is_no_list_of_patterns() -> None:
    with pytest.raises(InputError, match="layers are patterns"):
        Ranks(conv=1, linear=1, layers="body")  # type: ignore[arg-type]


# --- what is stored


@pytest.mark.parametrize("learn_down", [True, False])
def test_the_way_to_a_fresh_network_and_back(learn_down) -> None:
    """Bit by bit what the packed network computes with its matrices rounded to float16."""
    ranks = Ranks(conv=2, linear=3, learn_down=learn_down)
    packed, fresh = adapted(ranks), adapted(ranks, moved=False)
    data = pack(packed, about=ABOUT, extra={"bias": torch.tensor([0.1, 2.0]), "scale": torch.tensor(3.0)})
    extra = unpack(fresh, data, about=ABOUT)
    merge(fresh)
    with torch.no_grad():
        for matrix in parameters(packed):
            matrix.copy_(matrix.half())
    assert all(torch.equal(weights(packed)[layer], weight) for layer, weight in weights(fresh).items())
    assert torch.equal(packed(images()), fresh(images()))
    assert extra.keys() == {"bias", "scale"}
    assert torch.equal(extra["bias"], torch.tensor([0.1, 2.0]).half().float())
    assert torch.equal(extra["scale"], torch.tensor(3.0))


def test_merging_leaves_the_network_that_was() -> None:
    module = adapted()
    wanted = weights(module)
    merge(module)
    assert adapted_layers(module) == []
    assert parameters(module) == []
    assert module.state_dict().keys() == network().state_dict().keys()
    assert type(module[0]) is nn.Conv2d
    assert not any(value.requires_grad for value in module.parameters())
    assert all(torch.equal(weights(module)[layer], weight) for layer, weight in wanted.items())


@pytest.mark.parametrize("learn_down", [True, False])
def test_two_bytes_a_number(learn_down) -> None:
    data = pack(adapted(Ranks(conv=2, linear=3, learn_down=learn_down)), about=ABOUT)
    shapes = [(8, 2, 36), (12, 2, 18), (20, 3, 48), (5, 3, 20)]  # rows, rank, columns
    numbers = sum(rank * (rows + (columns if learn_down else 0)) for rows, rank, columns in shapes)
    header = int.from_bytes(data[:8], "little")
    assert len(data) == 8 + header + 2 * numbers


def test_other_readers_read_it() -> None:
    module = adapted()
    data = pack(module, about=ABOUT)
    tensors = safetensors.torch.load(data)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert torch.equal(tensors["5.0.A"], adapter(module, "5.0").A.half())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == ABOUT


def test_equal_input_gives_equal_bytes() -> None:
    """The library's keys of metadata come from a hash table, which has another order every time."""
    about = {letter: letter for letter in "qwertyuiop"}
    module, extra = adapted(), {"b": torch.ones(1), "a": torch.ones(2)}
    turned = dict(reversed(about.items()))
    found = {pack(module, about=each, extra=extra) for each in [about, turned] * 3}
    assert len(found) == 1
    raw = {safetensors.torch.save(extra, metadata=about) for _ in range(20)}
    assert len(raw) > 1, "the library sorts by itself, and pack need not"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70000.0])
def test_numbers_that_float16_cannot_hold(value) -> None:
    module = adapted()
    with torch.no_grad():
        adapter(module, "5.0").B[0, 0] = value
    with pytest.raises(NonFiniteError, match=r"5\.0\.B"):
        pack(module, about=ABOUT)


# --- what is refused


@pytest.mark.parametrize(
    "data", [b"", b"no adapter", b"\xff" * 40, None], ids=["empty", "text", "huge", "truncated"]
)
def test_not_safetensors(data) -> None:
    module = adapted()
    data = pack(module, about=ABOUT)[:-10] if data is None else data
    refused(DamagedDataError, "not in the safetensors format", module=module, data=data)


def test_numbers_of_another_kind() -> None:
    module = adapted()
    state = safetensors.torch.load(pack(module, about=ABOUT))
    wide = {**state, "5.0.B": state["5.0.B"].float()}
    data = safetensors.torch.save(wide, metadata=ABOUT)
    refused(DamagedDataError, "5.0.B: ", "found: F32", "F16", module=module, data=data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stored_numbers_that_are_not_finite(value) -> None:
    module = adapted()
    state = safetensors.torch.load(pack(module, about=ABOUT))
    state["5.0.B"][0, 0] = value
    data = safetensors.torch.save(state, metadata=ABOUT)
    refused(DamagedDataError, "5.0.B: ", "NaN or infinite", module=module, data=data)


def with_metadata(data: bytes, metadata: Any) -> bytes:
    """The same tensors behind a header that no library would write."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8 : 8 + size]), "__metadata__": metadata}).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


@pytest.mark.parametrize("metadata", [None, 3, "text", [], ["encoder"], {"encoder": 1}, {"encoder": None}])
def test_metadata_of_another_kind(metadata) -> None:
    module = adapted()
    data = with_metadata(pack(module, about=ABOUT), metadata)
    refused(DamagedDataError, "adapter", module=module, data=data)


def test_metadata_that_is_null_is_told() -> None:
    """The library takes it for none."""
    module = adapted()
    data = with_metadata(pack(module, about=ABOUT), None)
    assert safetensors.torch.load(data)
    refused(DamagedDataError, "__metadata__: ", "found: null", "texts", module=module, data=data)


def test_an_adapter_of_other_layers() -> None:
    data = pack(adapted(Ranks(conv=0, linear=3)), about=ABOUT)
    module = adapted(Ranks(conv=2, linear=3, layers=("0", "5.0")))
    missing = "0.A is missing; 0.B is missing; 5.2.A is unknown; and 1 more"
    refused(InputError, "an adapter for another encoder", missing, module=module, data=data)


def test_an_adapter_of_other_ranks() -> None:
    data = pack(adapted(Ranks(conv=0, linear=2)), about=ABOUT)
    module = adapted(Ranks(conv=0, linear=3))
    refused(InputError, "5.0.A is (2, 48) instead of (3, 48); ", "and 1 more", module=module, data=data)


@pytest.mark.parametrize(
    ("about", "key", "found", "wanted"),
    [
        ({**ABOUT, "sha256": "1234"}, "sha256", "1234", "00ff"),
        ({"encoder": "timm/some"}, "sha256", "nothing", "00ff"),
        ({**ABOUT, "odd": "9"}, "odd", "9", "nothing"),
    ],
)
def test_an_adapter_of_something_else(about, key, found, wanted) -> None:
    module = adapted()
    data = pack(module, about=about)
    refused(
        InputError,
        f"{key}: the adapter belongs",
        f"found: {found}",
        f"allowed: {wanted}",
        module=module,
        data=data,
    )


def test_matrices_that_follow_from_another_seed() -> None:
    """They are not stored, and would be other ones without a word."""
    ranks = Ranks(conv=0, linear=3, learn_down=False)
    data = pack(adapted(ranks, seed=3), about=ABOUT)
    refused(InputError, "down_seed", "found: 3", "allowed: 4", module=adapted(ranks, seed=4), data=data)
