"""The sentence says what the numbers say: better, worse, or no measurable difference."""

from __future__ import annotations

from dataclasses import replace

from distill.evaluation.results import ArmResult, Evaluation, PairedDifference
from distill.report.verdict import verdict


def with_random(evaluation: Evaluation, accuracies: tuple[float, ...]) -> Evaluation:
    ours = evaluation.results[0]
    random = replace(evaluation.results[1], accuracies=accuracies)
    return replace(evaluation, results=(ours, random), paired=(PairedDifference.between(ours, random),))


def test_better(evaluation: Evaluation) -> None:
    assert verdict(evaluation) == (
        "10 images per class with soft labels reach 83.0% ± 2.5 where as many random real images "
        "with hard labels reach 72.0% ± 5.0; full data in 52 epochs 97.0%."
    )


def test_worse(evaluation: Evaluation) -> None:
    text = verdict(with_random(evaluation, (0.90, 0.91, 0.93)))
    assert ", worse than as many random real images with hard labels at 91.3%" in text
    assert "full data" not in text


def test_undecided(evaluation: Evaluation) -> None:
    text = verdict(with_random(evaluation, (0.80, 0.83, 0.84)))
    assert ", no measurable difference from as many random real images with hard labels at 82.3%" in text


def test_one_epoch_of_full_data_is_told(evaluation: Evaluation) -> None:
    ours, random, full = evaluation.results
    one = replace(evaluation, results=(ours, random, replace(full, epochs=1)))
    assert verdict(one).endswith("; full data in 1 epoch 97.0%.")


def test_identical_differences(evaluation: Evaluation) -> None:
    text = verdict(with_random(evaluation, (0.72, 0.73, 0.74)))
    assert "± 2.5, identical differences for every seed, where as many random" in text


def test_identical_accuracies_are_no_difference(evaluation: Evaluation) -> None:
    text = verdict(with_random(evaluation, evaluation.results[0].accuracies))
    assert ", no measurable difference from as many random" in text


def test_too_few_seeds(evaluation: Evaluation) -> None:
    """No interval is quoted that is wider than the scale: +-147 points says nothing but that."""
    ours = replace(evaluation.results[0], accuracies=(0.361, 0.593))
    wide = replace(evaluation, results=(ours, *evaluation.results[1:]))
    apart = verdict(with_random(wide, (0.6, 0.5)))
    assert apart.endswith(
        "reach 47.7%, too few seeds to tell a difference, where as many random real images with hard labels "
        "reach 55.0%."
    )
    alike = verdict(with_random(wide, (0.37, 0.58)))
    assert alike.endswith(
        "47.7%, no measurable difference from as many random real images with hard labels at 47.5%; "
        "too few seeds for an interval."
    )


def test_one_seed(evaluation: Evaluation) -> None:
    ours = replace(evaluation.results[0], accuracies=(0.83,))
    text = verdict(with_random(replace(evaluation, results=(ours, evaluation.results[1])), (0.5,)))
    assert "reach 83.0%, one seed only, where as many random" in text


def test_comparison_is_chosen_by_place_not_by_result(evaluation: Evaluation) -> None:
    ours, random = evaluation.results[:2]
    hard = ArmResult("set", "hard", "convnet", (0.5, 0.51, 0.52), epochs=300, steps=300, images=100)
    pairs = (PairedDifference.between(hard, random), PairedDifference.between(ours, random))
    text = verdict(replace(evaluation, results=(ours, hard, random), paired=pairs))
    assert text.startswith("10 images per class with hard labels reach 51.0%")


def test_amounts(evaluation: Evaluation) -> None:
    def begins(*counts: int) -> str:
        return verdict(replace(evaluation, images_per_class=counts)).partition(" with ")[0]

    assert begins(*[1] * 100) == "1 image per class"
    assert begins(30, 0, 40, 30) == "100 images", "as many as four classes of 25, which they are not"
    assert begins() == "100 images", "an older report"


def test_where_students_are_tested(evaluation: Evaluation) -> None:
    def tested(on: str) -> str:
        return verdict(replace(evaluation, recipe={**evaluation.recipe, "evaluate": {"on": on}}))

    assert "reach 83.0% ± 2.5 where as many" in tested("data")
    assert "reach 83.0% ± 2.5 on the target where as many" in tested("target")
    assert "reach 83.0% ± 2.5 by linear probes on the target where as many" in tested("transfer")


def test_without_comparison(evaluation: Evaluation) -> None:
    alone = replace(evaluation, results=evaluation.results[:1], paired=())
    assert verdict(alone) == "10 images per class with soft labels reach 83.0% ± 2.5."
    assert verdict(replace(alone, results=())) == "The set was not evaluated."
