"""Teachers by recipe: alike ones differ, and those from files are right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from distill.cache.teachers import TeacherConfig, train_teacher
from distill.contracts import Context, Preprocessing, Source
from distill.errors import InputError
from distill.labels.pool import PoolTeacher, open_pool
from distill.preprocessing import Transform

MakeContext = Callable[..., Context]
MakeSource = Callable[..., Source]
CPU = torch.device("cpu")
NAME = "shufflenet_v2_x0_5"
TRAINED = {"model": {"name": "convnet", "width": 4, "norm": "batch"}, "train": {"epochs": 1}}
GREY = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture
def coloured(make_source: MakeSource) -> Source:
    return make_source(channels=3, valid=4)


def weights(
    folder: Path, source: Source, mean: tuple[float, ...], std: tuple[float, ...], *, order: list[int]
) -> Path:
    """The file of a random network whose last layer, in closed form, puts class order[k] at output k."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(NAME, weights=None, num_classes=3).eval()
    parts = (source.train, source.valid)
    x = Transform(Preprocessing(mean, std))(torch.cat([part.images for part in parts]))
    labels = torch.cat([part.labels for part in parts])
    found: list[Tensor] = []
    network.fc.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    with torch.no_grad():
        network(x)
        features = torch.cat([found[0], torch.ones(len(x), 1)], dim=1).double()
        wanted = torch.nn.functional.one_hot(labels)[:, order].double()
        layer = torch.linalg.lstsq(features, wanted, driver="gelsd").solution.T.float()
        network.fc.weight.copy_(layer[:, :-1])
        network.fc.bias.copy_(layer[:, -1])
    path = folder / "weights.pt"
    torch.save(network.state_dict(), path)
    return path


def from_file(path: Path, **options: Any) -> PoolTeacher:
    model = {"name": f"torchvision/{NAME}", "weights": str(path)}
    return PoolTeacher.model_validate({"model": model, "train": None, **options})


def test_teachers_from_files_are_as_their_files_have_them(
    coloured: Source, make_context: MakeContext, tmp_path: Path, trained: list[Any]
) -> None:
    pooled = from_file(weights(tmp_path, coloured, coloured.mean, coloured.std, order=[0, 1, 2]))
    first, second = open_pool(make_context(), coloured, [pooled, pooled])
    assert trained == []
    assert first.facts["valid_accuracy"] == second.facts["valid_accuracy"] == 1.0
    assert first.preprocessing == Preprocessing(coloured.mean, coloured.std)


@pytest.mark.parametrize("valid", [4, 0])
def test_files_whose_classes_stand_in_another_order_are_refused(
    make_source: MakeSource, make_context: MakeContext, tmp_path: Path, valid: int
) -> None:
    """Output 1 means class 0, 2 means 1 and 0 means 2; the train split tells where there is no other."""
    source = make_source(channels=3, valid=valid)
    pooled = from_file(weights(tmp_path, source, source.mean, source.std, order=[2, 0, 1]))
    with pytest.raises(InputError, match="stand in another order") as caught:
        open_pool(make_context(), source, [PoolTeacher.model_validate(TRAINED), pooled])
    told = str(caught.value)
    assert f"torchvision/{NAME} (weights.pt)" in told
    assert "output 1 means 'zero', class 0" in told and "output 0 means 'two', class 2" in told
    assert "0.0% right as numbered, 100.0% in another order" in told


def test_files_are_read_behind_their_own_mean_and_std(
    coloured: Source, make_context: MakeContext, tmp_path: Path
) -> None:
    mean, std = GREY
    path = weights(tmp_path, coloured, mean, std, order=[0, 1, 2])
    (network,) = open_pool(make_context(), coloured, [from_file(path, mean=mean, std=std)])
    assert network.preprocessing == Preprocessing(mean, std)
    assert network.facts["valid_accuracy"] == 1.0
    with pytest.raises(InputError, match="mean and std of a teacher do not fit the images") as caught:
        open_pool(make_context(), coloured, [from_file(path, mean=(0.5,), std=(0.5,))])
    assert "1 and 1 numbers" in str(caught.value)


def test_a_teacher_that_is_not_trained_names_its_file(coloured: Source, make_context: MakeContext) -> None:
    pooled = PoolTeacher.model_validate({"model": f"torchvision/{NAME}", "train": None})
    with pytest.raises(InputError, match="is not trained, and names no weights"):
        open_pool(make_context(), coloured, [pooled])


def test_teachers_of_one_configuration_differ(source: Source, make_context: MakeContext) -> None:
    """The first is the one that a step with a single teacher has; the order of the pool is kept."""
    alike = PoolTeacher.model_validate(TRAINED)
    other = PoolTeacher.model_validate({**TRAINED, "model": {**TRAINED["model"], "width": 6}})
    ctx = make_context()
    first, wide, second = open_pool(ctx, source, [alike, other, alike])
    assert (first.model, wide.model, second.model) == (alike.model, other.model, alike.model)
    weight = "classifier.weight"
    assert not torch.equal(first.state[weight], second.state[weight])
    single = train_teacher(ctx, source, TeacherConfig.model_validate(TRAINED), name="teacher")
    assert torch.equal(single.state[weight], first.state[weight])
