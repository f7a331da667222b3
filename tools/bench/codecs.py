"""What codecs cost and what they keep: one set, its labels stored in every way, students trained on each.

    python tools/bench/codecs.py SET.H5 [--seeds 5] [--stores codecs|distances] [KEY=VALUE ...]

SET.H5 is a set with labels of views by codec `full`. Its logits are stored again by other codecs, and as fewer
passes, from which students draw; nothing else changes, neither images nor views nor seeds. KEY=VALUE are overrides of
the set's recipe, such as data.folder=FOLDER. `--stores distances` compares the two numbers a view of codec `dbr`, by
every loss that learns from them and at two temperatures, with full and with one-hot labels. Labels `online` are those
of `full` (tests/labels/test_labelling.py).

`ratio`: bytes of `full` / bytes of the smallest store whose mean accuracy lies within the 95% interval of `full`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from distill.contracts import DistilledSet, SoftLabels
from distill.data import open_source
from distill.evaluation.protocol import Ledger, Protocol, evaluate
from distill.evaluation.results import ArmResult
from distill.labels.codecs import KEPT, VIEWS, CodecConfig, decode_rows, encode, label_bytes
from distill.labels.view_labels import StoredLabels, plan_of
from distill.pipeline import choose_device
from distill.progress import open_progress
from distill.randomness import pass_order
from distill.set_recipe import read_provenance, recipe_of_set
from distill.store.reader import read_set
from distill.training.engine import Engine


@dataclass(frozen=True)
class Store:
    """A way to store labels, and to learn from them.

    Args:
        codec: how; None: one-hot labels, which cost nothing beside the images' classes.
        share: 1 / share of the passes is kept.
        loss, temperature: of labels and students; None: the set's.
    """

    codec: CodecConfig | None
    share: int = 1
    loss: str | None = None
    temperature: float | None = None

    @property
    def name(self) -> str:
        if self.codec is None:
            return "one-hot"
        told = {"loss": self.loss, "T": self.temperature}
        return self._kept + "".join(f", {name} {value}" for name, value in told.items() if value is not None)

    @property
    def _kept(self) -> str:
        assert self.codec is not None, "stored labels"
        options = "".join(f", {name} = {value}" for name, value in self.codec.options.items())
        return f"`{self.codec.name}`{options}" + (
            f", 1 / {self.share} of the passes" if self.share > 1 else ""
        )


STORES = (
    Store(CodecConfig()),
    Store(CodecConfig(name="quantised", bits=4)),
    Store(CodecConfig(name="topk", k=3)),
    Store(CodecConfig(name="topk", k=1)),
    Store(CodecConfig(), share=10),
    Store(CodecConfig(), share=40),
    Store(CodecConfig(name="quantised", bits=4), share=20),
)
DISTANCES = (
    Store(CodecConfig()),
    *(
        Store(CodecConfig(name="dbr"), loss=loss, temperature=temperature)
        for temperature in (None, 1.0)
        for loss in ("kl", "dbr_l1", "dbr_l2")
    ),
    Store(None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--stores", choices=("codecs", "distances"), default="codecs")
    parser.add_argument("--device")
    args = parser.parse_intermixed_args()
    print("| labels | bytes | of full | accuracy, 95% interval |\n|---|---|---|---|", flush=True)
    rows = []
    for store, size, result in measured(args):
        rows.append((size, result.accuracy_mean))
        if len(rows) == 1:
            full, half = rows[0], result.accuracy_ci95 or 0.0
        print(
            f"| {store.name} | {size:,} | {f'1 / {full[0] / size:.1f}' if size else 0} | "
            f"{100 * result.accuracy_mean:.1f} ± "
            f"{100 * (result.accuracy_ci95 or 0.0):.1f} |",
            flush=True,
        )
    within = [size for size, accuracy in rows if size and abs(accuracy - full[1]) <= half]
    print(
        json.dumps(
            {
                "benchmark": "codecs",
                "ratio": round(full[0] / min(within), 1),
                "full": round(full[1], 4),
                "ci95": round(half, 4),
                "accuracies": [round(accuracy, 4) for _, accuracy in rows],
            }
        )
    )


def measured(args: argparse.Namespace) -> Iterator[tuple[Store, int, ArmResult]]:
    """Bytes and accuracy of every store."""
    distilled = read_set(args.set)
    device = choose_device(args.device)
    with open_progress(None, quiet=True) as progress:
        made = read_provenance(distilled, where=str(args.set))
        loaded, _ = recipe_of_set(args.set, made, args.overrides, progress=progress)
        recipe = loaded.recipe
        source = open_source(recipe.data, seed=recipe.seed, progress=progress)  # type: ignore[arg-type]
        with Engine(device, precision=recipe.precision, progress=progress) as engine:
            for store in STORES if args.stores == "codecs" else DISTANCES:
                regime = "hard" if store.codec is None else "soft"
                soft = distilled.soft if store.codec is None else stored(distilled, store)
                assert soft is not None
                changes = {"loss": store.loss, "temperature": store.temperature}
                train = distilled.train.model_copy(
                    update={key: value for key, value in changes.items() if value is not None}
                )
                results, _ = evaluate(
                    replace(distilled, soft=soft, train=train),
                    source,
                    Protocol(
                        recipe.evaluate.students,
                        args.seeds,
                        (),
                        (regime,),
                        full_epochs=None,
                        seed=recipe.seed,
                    ),
                    engine=engine,
                    progress=progress,
                    ledger=Ledger(None, identity=""),
                    views=StoredLabels(soft, distilled.labels),
                )
                yield store, 0 if store.codec is None else label_bytes(soft), results[0]


def stored(distilled: DistilledSet, store: Store) -> SoftLabels:
    """The set's labels by another codec, and of its first passes alone."""
    soft = distilled.soft
    assert soft is not None and soft.codec == "full" and KEPT not in soft.arrays, "labels of views, in full"
    plan = dict(soft.attributes[VIEWS])
    plan["epochs"] = max(1, plan["epochs"] // store.share)
    passes = range(plan["epochs"])
    logits = torch.stack([decode_rows(soft, view, slice(None)) for view in passes])
    views = plan_of(soft)
    assert views is not None and store.codec is not None
    orders = [pass_order(views.seed, view, len(distilled)) for view in passes]
    pairs = torch.stack(
        [views.pairs(view, order, distilled.labels) for view, order in zip(passes, orders, strict=True)]
    )
    attributes = {**soft.attributes, VIEWS: plan, **store.codec.options}
    if store.temperature is not None:
        attributes["temperature"] = store.temperature
    coded = encode(logits, codec=store.codec.name, pairs=pairs, **attributes)
    return replace(coded, arrays={name: np.ascontiguousarray(each) for name, each in coded.arrays.items()})


if __name__ == "__main__":
    main()
