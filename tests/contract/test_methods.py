"""What every registered method keeps, built in or installed, whatever it does inside.

A method needs a row in `CASES`: its smallest useful configuration. One without fails `test_every_method_has_a_case`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from distill.contracts import (
    Context,
    DistilledSet,
    DocumentSelector,
    Method,
    MethodConfig,
    Selection,
    Source,
    Split,
)
from distill.errors import InputError
from distill.registry import methods
from distill.selection import class_counts, materialise
from distill.store.checks import check_set
from distill.store.writer import write_set

MATCHING = {
    "experts": {"model": {"name": "convnet", "width": 4}, "count": 2, "batch_size": 8},
    "start_epochs": {"last": 1},
    "expert_epochs": 1,
    "iterations": 3,
    "inner_steps": 3,
    "lr_images": 1.0,
}
VOTING = {
    "teachers": [
        {"model": {"name": "convnet", "width": 4, "norm": "batch"}, "train": {"epochs": 1, "batch_size": 12}},
        {"model": {"name": "convnet", "width": 6, "norm": "batch"}, "train": {"epochs": 1, "batch_size": 12}},
    ],
    "priors": [60.0, 50.0],
    "recover": {"iterations": 2, "augment": "crop"},
}
NETWORK = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 1, "batch_size": 16}}
GLISTER = {"ipc": 2, "network": NETWORK, "against": "train"}


@dataclass(frozen=True)
class Case:
    """A configuration under test.

    Args:
        method: registered name.
        options: quick, and giving `images` images of every class.
        images: of every class of the result.
        random: another seed must give another result.
        behind: options for use behind a selector that keeps 4 images a class; None where it cannot stand there.
        whole: classes have no say: for three of them `images` are kept of each in the mean.
        alone: whether data of one class mean anything to it; they are refused where not.
    """

    method: str
    options: Mapping[str, Any]
    images: int
    random: bool
    behind: Mapping[str, Any] | None
    whole: bool = False
    alone: bool = True

    def __str__(self) -> str:
        return f"{self.method}-{self.options['features']}" if "features" in self.options else self.method

    def build(self, options: Mapping[str, Any] | None = None) -> Method:
        cls = methods()[self.method].load()
        return cls(read(cls.Config, self.options if options is None else options))


def measured(method: str, features: str, *, random: bool) -> Case:
    """A selector in a feature space; in pixels nothing is left to chance."""
    options: dict[str, Any] = {"ipc": 2, "features": features}
    if features != "pixels":
        options["network"] = NETWORK
    return Case(method, options, images=2, random=random, behind=options)


def targeted(method: str, features: str, *, random: bool, **more: Any) -> Case:
    """A selector with a target, which reads it in a feature space; classes have no say."""
    options: dict[str, Any] = {"count": 6, "features": features, **more}
    if features != "pixels":
        options["network"] = NETWORK
    alone = features == "pixels"  # networks learn nothing from one class
    return Case(method, options, images=2, random=random, behind=options, whole=True, alone=alone)


def of_images() -> set[str]:
    """Methods whose suite this is; test_document_selectors.py has that of the others."""
    return {name for name, entry in methods().items() if not issubclass(entry.load(), DocumentSelector)}


CASES = [
    Case("random", {"ipc": 2}, images=2, random=True, behind={"fraction": 0.5}),
    measured("kcenter", "pixels", random=False),
    measured("kcenter", "network", random=True),
    measured("kcenter", "gradients", random=True),
    measured("herding", "pixels", random=False),
    measured("herding", "network", random=True),
    measured("facility_location", "pixels", random=False),
    measured("facility_location", "gradients", random=True),
    measured("graph_cut", "pixels", random=False),
    measured("graph_cut", "network", random=True),
    measured("craig", "last_layer", random=True),
    measured("craig", "gradients", random=True),
    measured("gradmatch", "last_layer", random=True),
    measured("gradmatch", "gradients", random=True),
    Case("glister", GLISTER, images=2, random=True, behind=GLISTER),
    measured("kmeans", "pixels", random=True),
    measured("kmeans", "network", random=True),
    measured("semdedup", "pixels", random=False),
    measured("semdedup", "network", random=True),
    targeted("simcore", "pixels", random=True, centroids=3),
    targeted("simcore", "network", random=True, centroids=3),
    targeted("tarot", "pixels", random=False),
    targeted("tarot", "gradients", random=True),
    targeted("importance", "pixels", random=True, folds=2),
    replace(targeted("importance", "network", random=True, folds=2), alone=True),
    targeted("importance", "pixels", random=True, ratio="quantised", buckets=3),
    replace(targeted("importance", "network", random=True, ratio="hashed", tables=8, bits=3), alone=True),
    targeted("trak", "gradients", random=True, checkpoints=1),
    targeted("less", "gradients", random=True, checkpoints=1),
    targeted("less", "last_layer", random=True, checkpoints=1),
    *(
        Case("score", options, images=2, random=True, behind=options)
        for options in (
            {"ipc": 2, "network": NETWORK},
            {"ipc": 2, "network": NETWORK, "by": "forgetting"},
            {"ipc": 2, "network": NETWORK, "by": "entropy", "keep": "middle"},
        )
    ),
    Case("ccs", {"ipc": 2, "network": NETWORK}, images=2, random=True, behind={"ipc": 2, "network": NETWORK}),
    measured("d2", "network", random=True),
    Case(
        "soft_label",
        {"ipc": 2, "teacher": NETWORK},
        images=2,
        random=True,
        behind={"teacher": NETWORK},
    ),
    Case("trajectory", {"ipc": 2, **MATCHING}, images=2, random=True, behind=MATCHING),
    Case("committee", {"ipc": 2, **VOTING}, images=2, random=True, behind={**VOTING, "init": "real"}),
    Case("nrr", {"ipc": 2, **VOTING}, images=2, random=True, behind={**VOTING, "init": "real"}),
]


def cases(that: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in CASES if that(case)], ids=str)


def trains(case: Case) -> bool:
    return bool(case.build().estimate(train=24, classes=3, before=None).trainings)


every_case = cases()
MakeSource = Callable[..., Source]
MakeContext = Callable[..., Context]


def read(config: type[MethodConfig], options: Mapping[str, Any]) -> MethodConfig:
    """The configuration as a recipe's options become one."""
    return config.model_validate_json(json.dumps(dict(options)))


def as_set(result: DistilledSet | Selection, ctx: Context, source: Source) -> DistilledSet:
    return materialise(result, source, ctx.train) if isinstance(result, Selection) else result


def content(result: DistilledSet | Selection, ctx: Context, source: Source) -> bytes:
    """The bytes of the set's file."""
    path = ctx.scratch / "contract.h5"
    write_set(as_set(result, ctx, source), path)
    return path.read_bytes()


def run(
    case: Case, ctx: Context, source: Source, previous: DistilledSet | Selection | None = None
) -> DistilledSet | Selection:
    """Check, then run, as the pipeline does; a method that reads a target is given one."""
    method = case.build(case.options if previous is None else case.behind)
    source = with_target(source) if method.uses_target else source
    method.check(source, None if previous is None else "selector")
    return method.run(ctx, source, previous)


def with_target(source: Source) -> Source:
    """The source with every third of its own images for a target."""
    images, labels = source.train.images[::3], source.train.labels[::3]
    train = Split(images, labels, fingerprint=f"a third of {source.train.fingerprint}")
    target = replace(Source(**source.__dict__), train=train)
    return type(source)(**{**source.__dict__, "target": target})


def first_of_each_class(source: Source, count: int) -> Selection:
    labels = source.train.labels.numpy()
    rows = [np.flatnonzero(labels == number)[:count] for number in range(len(source.classes))]
    indices = np.concatenate(rows)
    return Selection(indices, np.ones(len(indices), np.float32), np.zeros(len(indices), np.float32))


def test_every_method_has_a_case() -> None:
    tested = {case.method for case in CASES}
    missing = sorted(of_images() - tested)
    assert not missing, f"no row in CASES for {', '.join(missing)}"
    assert tested <= of_images()


@pytest.mark.parametrize("name", sorted(of_images()))
def test_the_class_says_what_the_registry_says(name: str) -> None:
    entry = methods()[name]
    cls = entry.load()
    assert issubclass(cls, Method) and issubclass(cls.Config, MethodConfig)
    assert (cls.name, cls.kind) == (name, entry.kind)
    assert entry.summary and (cls.__doc__ or "").strip()
    assert cls.Config.__doc__, "options are explained where they are declared"


# --- the result


@every_case
def test_the_result_is_sound(case: Case, source: Source, make_context: MakeContext) -> None:
    ctx = make_context()
    result = run(case, ctx, source)
    assert isinstance(result, Selection if case.build().kind == "selector" else DistilledSet)
    made = as_set(result, ctx, source)
    check_set(made)
    assert made.classes == source.classes
    assert made.images.dtype in (torch.uint8, torch.float16)
    assert tuple(made.images.shape[1:]) == source.image_shape


def assert_budget(case: Case, made: DistilledSet) -> None:
    """The budget of three classes is kept: in all, and of each class where classes have a say."""
    counts = class_counts(made.labels.numpy(), 3)
    assert counts.sum() == 3 * case.images
    assert case.whole or counts.tolist() == [case.images] * 3


@every_case
def test_the_budget_is_kept(case: Case, source: Source, make_context: MakeContext) -> None:
    ctx = make_context()
    made = as_set(run(case, ctx, source), ctx, source)
    assert_budget(case, made)
    estimate = case.build().estimate(train=len(source.train), classes=3, before=None)
    assert estimate.images == len(made)


@every_case
def test_a_selection_is_distinct_and_inside_the_train_split(
    case: Case, source: Source, make_context: MakeContext
) -> None:
    ctx = make_context()
    chosen = as_set(run(case, ctx, source), ctx, source).selection
    if chosen is None:
        pytest.skip("synthesises its images")
    assert (chosen.indices.dtype, chosen.weights.dtype, chosen.scores.dtype) == (
        np.int64,
        np.float32,
        np.float32,
    )
    assert len(chosen.indices) == len(chosen.weights) == len(chosen.scores)
    assert len(np.unique(chosen.indices)) == len(chosen.indices)
    assert chosen.indices.min() >= 0 and chosen.indices.max() < len(source.train)
    assert chosen.weights.mean() == pytest.approx(1)
    assert np.isfinite(chosen.scores).all() and (chosen.weights >= 0).all()
    assert chosen.meta["score"], "scores are explained"


# --- chance


@every_case
def test_same_seed_same_bytes(case: Case, source: Source, make_context: MakeContext) -> None:
    first, second = make_context(seed=5), make_context(seed=5)
    torch.manual_seed(1)
    a = content(run(case, first, source), first, source)
    torch.manual_seed(2)  # global generators have no say
    np.random.seed(2)
    b = content(run(case, second, source), second, source)
    assert a == b


@every_case
def test_the_global_generators_are_left_alone(case: Case, source: Source, make_context: MakeContext) -> None:
    ctx = make_context()
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    run(case, ctx, source)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == before_numpy  # type: ignore[index]


@every_case
def test_another_seed_matters_where_chance_does(
    case: Case, source: Source, make_context: MakeContext
) -> None:
    results = set()
    for seed in range(4):
        ctx = make_context(seed=seed)
        results.add(content(run(case, ctx, source), ctx, source))
    assert (len(results) > 1) == case.random


@every_case
def test_what_the_cache_holds_does_not_matter(
    case: Case, source: Source, make_context: MakeContext, tmp_path: Path
) -> None:
    cold, warm = (make_context(folder=tmp_path / "shared") for _ in range(2))
    first = content(run(case, cold, source), cold, source)
    assert content(run(case, warm, source), warm, source) == first


@cases(trains)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    case: Case, source: Source, make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after its first training, before the result was kept."""
    whole = make_context()
    wanted = content(run(case, whole, source), whole, source)
    cut = make_context(folder=tmp_path / "cut")
    train = cut.engine.train

    def interrupted(*args: Any, **options: Any) -> None:
        train(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(cut.engine, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(case, cut, source)
    again = make_context(folder=tmp_path / "cut")
    assert content(run(case, again, source), again, source) == wanted


# --- what a method may not read or change


class Tripwire(Source):
    """A source whose test split cannot be touched, not even to see whether it is there."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("test", "held_out"):
            raise AssertionError("a method reached for the test split")
        return super().__getattribute__(name)


def tripwire(source: Source) -> Source:
    return Tripwire(**source.__dict__)


@every_case
def test_the_test_split_is_untouched(case: Case, source: Source, make_context: MakeContext) -> None:
    ctx = make_context()
    run(case, ctx, tripwire(source))
    if case.behind is not None:
        run(case, ctx, tripwire(source), first_of_each_class(source, 4))


def test_a_source_without_test_has_none_and_a_tripwire_works(source: Source) -> None:
    assert len(source.test) == 12
    bare = source.without_test()
    assert bare.held_out is None
    for reach in (lambda: bare.test, lambda: tripwire(source).test, lambda: tripwire(source).held_out):
        with pytest.raises(AssertionError, match="test split"):
            reach()


@every_case
def test_the_result_does_not_depend_on_the_test_split(
    case: Case, source: Source, make_context: MakeContext
) -> None:
    with_test, without = make_context(), make_context()
    a = content(run(case, with_test, source), with_test, source)
    assert content(run(case, without, source.without_test()), without, source) == a


@every_case
def test_the_source_is_left_as_it_was(case: Case, source: Source, make_context: MakeContext) -> None:
    images, labels = source.train.images.clone(), source.train.labels.clone()
    run(case, make_context(), source)
    assert torch.equal(source.train.images, images)
    assert torch.equal(source.train.labels, labels)


# --- sources out of the ordinary


@every_case
def test_one_class_alone(case: Case, make_source: MakeSource, make_context: MakeContext) -> None:
    source, ctx = make_source((8,)), make_context()
    if not case.alone:
        with pytest.raises(InputError, match="one class"):
            case.build().check(with_target(source), None)
        return
    made = as_set(run(case, ctx, source), ctx, source)
    check_set(made)
    assert made.labels.tolist() == [0] * (3 * case.images if case.whole else case.images)
    assert not made.provenance.get("skipped"), (
        "no step was left out, which would leave the images as they were"
    )


@every_case
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour(
    case: Case, make_source: MakeSource, make_context: MakeContext, channels: int
) -> None:
    source, ctx = make_source(channels=channels), make_context()
    made = as_set(run(case, ctx, source), ctx, source)
    assert tuple(made.images.shape[1:]) == (channels, 8, 8)


@every_case
def test_without_a_validation_split(case: Case, make_source: MakeSource, make_context: MakeContext) -> None:
    source, ctx = make_source(valid=0), make_context()
    check_set(as_set(run(case, ctx, source), ctx, source))


@every_case
def test_classes_of_very_different_size(
    case: Case, make_source: MakeSource, make_context: MakeContext
) -> None:
    """The smallest class has just what is asked for."""
    source, ctx = make_source((case.images, 30, 9)), make_context()
    assert_budget(case, as_set(run(case, ctx, source), ctx, source))


@every_case
def test_images_that_are_all_alike(case: Case, source: Source, make_context: MakeContext) -> None:
    """Nothing to tell samples apart by: still the budget, and no sample twice."""
    train = Split(torch.full_like(source.train.images, 7), source.train.labels, fingerprint="all alike")
    ctx, alike = make_context(), replace(source, train=train, std=(1.0,))
    made = as_set(run(case, ctx, alike), ctx, alike)
    check_set(made)
    assert not made.provenance.get("skipped"), (
        "no step was left out, which would leave the images as they were"
    )


@cases(lambda case: not case.whole)
def test_a_class_smaller_than_the_budget_is_refused_before_any_work(
    case: Case, make_source: MakeSource
) -> None:
    """By `check` alone, which is given neither engine nor cache."""
    source = make_source((8, case.images - 1, 8))
    with pytest.raises(InputError, match=f"{case.images} images per class") as caught:
        case.build().check(source, None)
    assert f"one ({case.images - 1})" in str(caught.value)


@cases(lambda case: case.whole)
def test_fewer_images_than_the_budget_are_refused_before_any_work(
    case: Case, make_source: MakeSource
) -> None:
    asked = 3 * case.images
    with pytest.raises(InputError, match=f"{asked} images are asked for, and there are {asked - 1}"):
        case.build().check(with_target(make_source((asked - 1,))), None)


# --- places in a list of steps


@every_case
def test_behind_a_selector(case: Case, source: Source, make_context: MakeContext) -> None:
    """Its images are those of the selection, which a selector narrows down."""
    before, ctx = first_of_each_class(source, 4), make_context()
    if case.behind is None:
        with pytest.raises(InputError):
            case.build().check(source, "selector")
        return
    made = as_set(run(case, ctx, source, before), ctx, source)
    check_set(made)
    assert case.build(case.behind).estimate(train=24, classes=3, before=12).images == len(made)
    if made.selection is not None:
        assert set(made.selection.indices) <= set(before.indices)


@cases(lambda case: case.build().kind == "selector")
def test_a_selector_behind_a_distiller_is_refused(case: Case, source: Source) -> None:
    with pytest.raises(InputError, match="cannot follow a distiller") as caught:
        case.build().check(source, "distiller")
    assert caught.value.fix


# --- limits of options, from the schema that declares them


def resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The alternatives of a schema, references followed."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        for form in schema["anyOf"]:
            yield from resolved(form, root)
    else:
        yield schema


def beyond(schema: Mapping[str, Any]) -> list[float]:
    """Numbers just outside the limits of a numeric field; none where it has no limit."""
    step = 1 if schema["type"] == "integer" else 1e-6
    found = [
        *([schema["minimum"] - step] if "minimum" in schema else []),
        *([schema["maximum"] + step] if "maximum" in schema else []),
        *([schema["exclusiveMinimum"]] if "exclusiveMinimum" in schema else []),
        *([schema["exclusiveMaximum"]] if "exclusiveMaximum" in schema else []),
    ]
    return [*found, float("nan"), float("inf")] if found and schema["type"] == "number" else found


def bad_options(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every numeric field with a limit as (path, options with a value beyond the limit)."""
    for form in resolved(schema, root):
        if form.get("type") in ("integer", "number"):
            yield from (((), value) for value in beyond(form))
        for name, child in form.get("properties", {}).items():
            named = form["properties"].get("name", {}).get("const")
            for path, value in bad_options(child, root):
                yield (name, *path), {**({"name": named} if named else {}), name: value}


def limit_cases() -> list[Any]:
    found = []
    for name in sorted(of_images()):
        schema = methods()[name].load().Config.model_json_schema()
        for number, (path, options) in enumerate(bad_options(schema, schema)):
            found.append(pytest.param(name, path, options, id=f"{name}-{'.'.join(path)}-{number}"))
    return found


@pytest.mark.parametrize(("name", "path", "options"), limit_cases())
def test_a_number_beyond_its_limit_is_refused(name: str, path: tuple[str, ...], options: Any) -> None:
    case = next(case for case in CASES if case.method == name)
    with pytest.raises(ValidationError) as caught:
        methods()[name].load().Config.model_validate({**case.options, **options})
    assert any(path[-1] in error["loc"] for error in caught.value.errors())


def test_limits_are_found_in_every_room_of_the_options() -> None:
    """The test above would pass on an empty list."""
    paths = {(param.values[0], param.values[1]) for param in limit_cases()}
    assert ("random", ("fraction",)) in paths
    assert ("kcenter", ("network", "model", "width")) in paths
    assert ("soft_label", ("teacher", "train", "momentum")) in paths
    assert ("soft_label", ("temperature",)) in paths


@every_case
def test_an_unknown_option_is_refused(case: Case) -> None:
    cls = methods()[case.method].load()
    with pytest.raises(ValidationError, match="no_such_option"):
        read(cls.Config, {**case.options, "no_such_option": 1})


@every_case
def test_a_configuration_survives_the_recipe_beside_the_set(case: Case) -> None:
    """Written in full and read again it is the same."""
    config = case.build().config
    assert read(type(config), config.model_dump(mode="json")) == config


@pytest.mark.gpu
@every_case
def test_gpu_equals_cpu_within_tolerance(case: Case, source: Source, make_context: MakeContext) -> None:
    on_cpu, on_gpu = (make_context(device=device) for device in ("cpu", "cuda"))
    a, b = (as_set(run(case, ctx, source), ctx, source) for ctx in (on_cpu, on_gpu))
    assert torch.equal(a.labels, b.labels)
    if a.selection is not None and b.selection is not None:
        assert a.selection.indices.tolist() == b.selection.indices.tolist()
        np.testing.assert_allclose(a.selection.scores, b.selection.scores, rtol=2e-2, atol=1e-3)
    if a.soft is not None and b.soft is not None:
        np.testing.assert_allclose(a.soft.arrays["logits"], b.soft.arrays["logits"], rtol=5e-2, atol=5e-2)
