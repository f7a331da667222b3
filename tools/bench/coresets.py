"""Every selector beside random images: one recipe, its selector exchanged, students trained on each choice.

    python tools/bench/coresets.py RECIPE [--fractions 0.01,0.05,0.1] [--only NAME,...] [--out FOLDER] [KEY=VALUE ...]

RECIPE is a path or the name of a shipped recipe whose only step is a selector; KEY=VALUE are overrides of it. For each
share of the training images the step is exchanged for each row of `ROWS`, with the network that the recipe's
own step has, and the run is made by the same road as `distill run`. Students of all runs take the same optimiser steps
(those of the recipe's `train` at its first share), from the same initial weights, seed by seed: differences are paired.
The random control is trained once a share, on another draw for each seed; intervals of the rows hold the students'
seeds alone. Targeted selectors and glister look at the validation split, a tenth of the labelled data that no student
learns from; it has the classes of the data, and what targeted ones were made for is another target.

A row's seconds are those of its selection with everything it needs, networks and features included, also where they
came from the cache; where only they are wanted, `train.epochs=1 evaluate.seeds=2` leaves little else. Finished runs
are read back: an interrupted table goes on.

`ratio`: selectors whose mean accuracy is above that of random images, over all rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.evaluation.results import ArmResult, PairedDifference
from distill.pipeline import RunResult, run
from distill.recipe import load_recipe


@dataclass(frozen=True)
class Row:
    """A selector with its options.

    Args:
        method: its name.
        options: beside budget and network.
        targeted: whether it resembles a target.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    targeted: bool = False

    @property
    def name(self) -> str:
        told = ", ".join(str(value) for value in self.options.values() if not isinstance(value, dict))
        return f"{self.method} ({told})" if told else self.method


ROWS = (
    Row("random"),
    Row("herding"),
    Row("kcenter"),
    Row("kmeans"),
    Row("kmeans", {"keep": "medoid"}),
    Row("semdedup"),
    Row("facility_location"),
    Row("graph_cut"),
    *(Row("score", {"by": name}) for name in ("el2n", "grand", "forgetting", "aum", "entropy", "margin")),
    Row("score", {"by": "least_confidence"}),
    Row("score", {"by": "el2n", "keep": "easiest"}),
    Row("ccs"),
    Row("d2"),
    Row("craig"),
    Row("gradmatch"),
    Row("glister"),
    Row("simcore", targeted=True),
    Row("tarot", targeted=True),
    Row("importance", targeted=True),
    Row("trak", targeted=True),
    Row("less", targeted=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--fractions", default="0.01,0.05,0.1")
    parser.add_argument("--only", help="methods, parted by commas")
    parser.add_argument("--out", type=Path, default=Path("runs/coresets"))
    parser.add_argument("--device")
    args = parser.parse_intermixed_args()
    wanted = sorted({row.method for row in ROWS}) if args.only is None else args.only.split(",")
    unknown = set(wanted) - {row.method for row in ROWS}
    if unknown:
        parser.error(f"no row of {', '.join(sorted(unknown))}")
    rows = [row for row in ROWS if row.method in wanted]
    above, measured = 0, 0
    for fraction in map(float, args.fractions.split(",")):
        print(f"\n{100 * fraction:g}% of the training images\n", flush=True)
        print("| selector | accuracy | minus random, paired | selection, s |\n|---|---|---|---|", flush=True)
        for row, result, pair, seconds in table(args, rows, fraction):
            print(
                f"| {row} | {_points(result.accuracy_mean, result.accuracy_ci95)} | "
                f"{'' if pair is None else _points(pair.difference_mean, pair.difference_ci95, sign='+')} | "
                f"{'' if seconds is None else f'{seconds:.0f}'} |",
                flush=True,
            )
            if pair is not None:
                measured += 1
                above += pair.difference_mean > 0
    print(
        json.dumps({"benchmark": "coresets", "ratio": round(above / max(measured, 1), 3), "rows": measured})
    )


def table(
    args: argparse.Namespace, rows: list[Row], fraction: float
) -> Iterator[tuple[str, ArmResult, PairedDifference | None, float | None]]:
    """The random control, then every selector: name, accuracy, paired difference, seconds of the selection."""
    control = next(
        result
        for result in selected(args, Row("random"), fraction).evaluation.results
        if result.arm == "random"
    )
    yield "random images, another draw for each seed", control, None, None
    for row in rows:
        done = selected(args, row, fraction)
        arms = {result.arm: result for result in done.evaluation.results}
        stage = next(cost for name, cost in done.evaluation.cost.items() if name.startswith("selector "))
        yield row.name, arms["set"], PairedDifference.between(arms["set"], control), stage.seconds


def selected(args: argparse.Namespace, row: Row, fraction: float) -> RunResult:
    """The run of a row; that of random images has the random control beside it, another draw for each seed."""
    recipe = load_recipe(args.recipe, args.overrides).recipe
    step = recipe.steps[0]
    network = step.config.network.model_dump(mode="json")  # type: ignore[attr-defined]
    shared = {} if row.method == "random" else {"network": network}
    asked = step.config.fraction  # type: ignore[attr-defined]
    epochs = max(1, round(recipe.train.epochs * asked / fraction))
    options = json.dumps({row.method: {"fraction": fraction, **shared, **row.options}})
    overrides = [
        *args.overrides,
        f"steps=[{options}]",
        f"train.epochs={epochs}",
        f"evaluate.against={'[random]' if row.method == 'random' else '[]'}",
    ]
    if row.targeted:
        overrides.append("target={name: valid}")
    name = row.name.replace(" ", "-").replace("(", "").replace(")", "").replace(",", "")
    return run(args.recipe, overrides, out=args.out / f"{fraction:g}" / name, device=args.device, quiet=True)


def _points(mean: float, half: float | None, *, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f} ± {100 * half:.1f}" if half is not None else f"{100 * mean:{sign}.1f}"


if __name__ == "__main__":
    main()
