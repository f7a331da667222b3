"""The protocol: paired seeds, the last epoch on test data, what a crash leaves known, and the order of differences."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.contracts import Context, DistilledSet, Source
from distill.errors import InputError
from distill.evaluation.protocol import Ledger, Protocol, evaluate, paired_differences
from distill.evaluation.results import ArmResult
from distill.models import describe, model_config
from distill.progress import NullProgress
from distill.training.config import TrainConfig
from distill.training.engine import Engine
from distill.training.job import Job, Trained

MLP = model_config({"name": "mlp", "width": 8})
CONVNET = model_config({"name": "convnet", "width": 4})
PROTOCOL = Protocol((MLP,), seeds=3, against=("random", "full"), regimes=None, full_epochs=None, seed=0)


class StubEngine:
    """Trains nothing: the accuracy of a job follows from its label. `stop` interrupts it after so many jobs."""

    def __init__(self, *, stop: int | None = None) -> None:
        self.jobs: list[Job] = []
        self.stop = stop

    def train(
        self, jobs: Sequence[Job], *, title: str, on_done: Callable[[int, Trained], None]
    ) -> list[Trained]:
        results = [Trained(0.0, accuracy(job.label), 0.0, 0) for job in jobs]
        for number in reversed(range(len(jobs))):  # in any order
            if self.stop is not None and len(self.jobs) == self.stop:
                raise KeyboardInterrupt
            self.jobs.append(jobs[number])
            on_done(number, results[number])
        return results


def accuracy(label: str) -> float:
    return sum(map(ord, label)) % 997 / 997


def run(
    distilled: DistilledSet,
    source: Source,
    *,
    engine: Any = None,
    ledger: Ledger | None = None,
    protocol: Protocol = PROTOCOL,
) -> tuple[Any, Any]:
    return evaluate(
        distilled,
        source,
        protocol,
        engine=StubEngine() if engine is None else engine,
        progress=NullProgress(),
        ledger=Ledger(None, identity="a") if ledger is None else ledger,
    )


# --- jobs


def test_every_arm_regime_student_and_seed_is_trained_once(soft_set: DistilledSet, source: Source) -> None:
    engine = StubEngine()
    protocol = replace(PROTOCOL, students=(MLP, CONVNET))
    run(soft_set, source, engine=engine, protocol=protocol)
    labels = {job.label for job in engine.jobs}
    assert len(engine.jobs) == len(labels) == 2 * 4 * 3
    assert f"student {describe(CONVNET)} on set (soft labels), seed 2" in labels


def test_two_students_of_one_name_are_refused(hard_set: DistilledSet, source: Source) -> None:
    name = "torchvision/resnet18"
    pair = tuple(model_config({"name": name, "weights": f"{folder}/weights.pt"}) for folder in "ab")
    with pytest.raises(InputError, match="two students would have one name"):
        run(hard_set, source, engine=StubEngine(), protocol=replace(PROTOCOL, students=pair))


def test_a_student_named_twice_is_trained_and_told_once(hard_set: DistilledSet, source: Source) -> None:
    engine = StubEngine()
    results, paired = run(hard_set, source, engine=engine, protocol=replace(PROTOCOL, students=(MLP, MLP)))
    assert (len(engine.jobs), len(results), len(paired)) == (9, 3, 2)


def test_seeds_are_paired_across_arms_and_students(soft_set: DistilledSet, source: Source) -> None:
    """The k-th network of every arm has one seed, and the three seeds differ."""
    engine = StubEngine()
    run(soft_set, source, engine=engine, protocol=replace(PROTOCOL, students=(MLP, CONVNET)))
    seeds = {k: {job.seed for job in engine.jobs if job.label.endswith(f"seed {k}")} for k in range(3)}
    assert all(len(own) == 1 for own in seeds.values())
    assert len(set.union(*seeds.values())) == 3


def test_the_root_seed_decides_the_seeds(hard_set: DistilledSet, source: Source) -> None:
    def seeds(seed: int) -> set[int]:
        engine = StubEngine()
        run(hard_set, source, engine=engine, protocol=replace(PROTOCOL, seed=seed))
        return {job.seed for job in engine.jobs}

    assert seeds(0) == seeds(0)
    assert not seeds(0) & seeds(1)


def test_all_are_tested_on_the_test_split_behind_the_sets_preprocessing(
    hard_set: DistilledSet, source: Source
) -> None:
    engine = StubEngine()
    run(hard_set, source, engine=engine)
    pools = {id(job.test): job.test for job in engine.jobs}
    (test,) = pools.values()  # one pool, so that an engine may test many networks at once
    assert test is not None
    assert test.images is source.test.images and test.targets is source.test.labels
    assert test.preprocessing is hard_set.preprocessing


def test_each_random_student_has_its_own_subset(hard_set: DistilledSet, source: Source) -> None:
    engine = StubEngine()
    run(hard_set, source, engine=engine)
    subsets = [tuple(job.indices.tolist()) for job in engine.jobs if job.indices is not None]
    assert len(subsets) == len(set(subsets)) == 3


# --- results


def test_results_are_in_order_and_tell_the_budget(soft_set: DistilledSet, source: Source) -> None:
    results, _ = run(soft_set, source)
    assert [(r.arm, r.regime, r.images, r.epochs, r.steps) for r in results] == [
        ("set", "hard", 6, 30, 60),
        ("set", "soft", 6, 30, 60),
        ("random", "hard", 6, 30, 60),
        ("full", "hard", 24, 10, 60),
    ]
    assert all(r.student == describe(MLP) for r in results)
    wanted = tuple(accuracy(f"student {describe(MLP)} on random (hard labels), seed {k}") for k in range(3))
    assert results[2].accuracies == wanted


def test_nothing_is_trained_where_the_set_cannot_be_compared(hard_set: DistilledSet, source: Source) -> None:
    engine = StubEngine()
    with pytest.raises(InputError):
        run(hard_set, source, engine=engine, protocol=replace(PROTOCOL, regimes=("soft",)))
    assert not engine.jobs


def result(arm: str, regime: str, value: float, student: str = "mlp") -> ArmResult:
    return ArmResult(arm, regime, student, (value, value + 0.1), epochs=1, steps=1, images=1)


def test_differences_of_the_best_labels_against_each_control_come_first() -> None:
    results = [
        result("set", "hard", 0.5),
        result("set", "soft", 0.7),
        result("random", "hard", 0.4),
        result("full", "hard", 0.8),
        result("set", "hard", 0.1, student="convnet"),
        result("random", "hard", 0.2, student="convnet"),
    ]
    found = paired_differences(results)
    assert [(d.student, d.arm_a, d.regime, d.arm_b, d.regime_b) for d in found] == [
        ("mlp", "set", "soft", "random", "hard"),
        ("mlp", "set", "hard", "random", "hard"),
        ("mlp", "set", "soft", "full", "hard"),
        ("mlp", "set", "hard", "full", "hard"),
        ("mlp", "set", "soft", "set", "hard"),
        ("convnet", "set", "hard", "random", "hard"),
    ]
    assert [d.difference_mean for d in found] == pytest.approx([0.3, 0.1, -0.1, -0.3, 0.2, -0.1])


def test_without_controls_and_with_one_regime_there_is_no_difference() -> None:
    assert paired_differences([result("set", "hard", 0.5)]) == []


# --- the ledger


def test_an_interrupted_evaluation_trains_only_what_is_missing(
    soft_set: DistilledSet, source: Source, tmp_path: Path
) -> None:
    path = tmp_path / "students.jsonl"
    cut, rest = StubEngine(stop=5), StubEngine()
    with pytest.raises(KeyboardInterrupt):
        run(soft_set, source, engine=cut, ledger=Ledger(path, identity="a"))
    found = run(soft_set, source, engine=rest, ledger=Ledger(path, identity="a"))
    assert (len(cut.jobs), len(rest.jobs)) == (5, 7)
    assert not {job.label for job in cut.jobs} & {job.label for job in rest.jobs}
    assert found == run(soft_set, source)


def test_a_finished_evaluation_trains_nothing_again(
    hard_set: DistilledSet, source: Source, tmp_path: Path
) -> None:
    path, engine = tmp_path / "students.jsonl", StubEngine()
    first = run(hard_set, source, ledger=Ledger(path, identity="a"))
    assert run(hard_set, source, engine=engine, ledger=Ledger(path, identity="a")) == first
    assert not engine.jobs


@pytest.mark.parametrize("cut", range(2, 45, 6))
def test_a_line_cut_off_by_a_crash_is_ignored_and_spoils_no_other(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "students.jsonl"
    before = Ledger(path, identity="a")
    before.add("one", 0.25)
    before.add("two", 0.5)
    path.write_bytes(path.read_bytes()[:-cut])
    found = Ledger(path, identity="a")
    assert found.known == {"one": 0.25}
    found.add("three", 0.75)
    found.add("four", 1.0)
    assert Ledger(path, identity="a").known == {"one": 0.25, "three": 0.75, "four": 1.0}


def test_a_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "students.jsonl"
    Ledger(path, identity="a").add("one", 0.25)
    path.write_bytes(path.read_bytes()[:-1])
    Ledger(path, identity="a").add("two", 0.5)
    assert Ledger(path, identity="a").known == {"one": 0.25, "two": 0.5}


@pytest.mark.parametrize(
    "line", ["", "null", "7", "[]", '["set", "job", "accuracy"]', '{"set": "a"}', "\x00\x00", "{"]
)
def test_lines_that_are_no_entries_are_ignored(tmp_path: Path, line: str) -> None:
    path = tmp_path / "students.jsonl"
    good = json.dumps({"set": "a", "job": "one", "accuracy": 0.25})
    path.write_text(f"{line}\n{good}\n")
    assert Ledger(path, identity="a").known == {"one": 0.25}


def test_bytes_that_are_no_text_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "students.jsonl"
    path.write_bytes(b'\xff\xfe\n{"set": "a", "job": "one", "accuracy": 0.25}\n')
    assert Ledger(path, identity="a").known == {"one": 0.25}


def test_lines_of_another_set_are_ignored(hard_set: DistilledSet, source: Source, tmp_path: Path) -> None:
    path, engine = tmp_path / "students.jsonl", StubEngine()
    run(hard_set, source, ledger=Ledger(path, identity="another"))
    run(hard_set, source, engine=engine, ledger=Ledger(path, identity="a"))
    assert len(engine.jobs) == 9


def test_a_ledger_without_a_file_remembers_within_one_evaluation() -> None:
    ledger = Ledger(None, identity="a")
    ledger.add("one", 0.5)
    assert ledger.known == {"one": 0.5}


def test_a_ledger_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        Ledger(tmp_path / "no folder" / "students.jsonl", identity="a").add("one", 0.5)


# --- end to end


@pytest.fixture
def tiny(soft_set: DistilledSet, source: Source) -> DistilledSet:
    """The set with the labels of an all-knowing teacher, and a training of a second."""
    known = torch.nn.functional.one_hot(soft_set.labels, 3).float() * 8
    assert soft_set.soft is not None
    soft = replace(soft_set.soft, arrays={"logits": known.half().numpy()[None]})
    return replace(soft_set, soft=soft, train=TrainConfig(epochs=40, batch_size=8, lr=0.05, augment="none"))


@pytest.mark.parametrize("half", [False, True])
def test_real_students_learn_from_the_set_and_more_from_all_data(
    tiny: DistilledSet, source: Source, make_context: Callable[..., Context], half: bool
) -> None:
    distilled = replace(tiny, images=tiny.images.half() / 255) if half else tiny
    engine: Engine = make_context().engine
    protocol = replace(PROTOCOL, students=(CONVNET,), seeds=2, full_epochs=30)
    results, paired = run(distilled, source, engine=engine, protocol=protocol)
    means = {(r.arm, r.regime): r.accuracy_mean for r in results}
    assert means["full", "hard"] >= 0.9
    assert means["set", "soft"] > 0.5 and means["set", "hard"] > 0.5  # chance is a third
    assert [(d.regime, d.arm_b) for d in paired][:2] == [("soft", "random"), ("hard", "random")]
    assert run(distilled, source, engine=engine, protocol=protocol) == (results, paired)
