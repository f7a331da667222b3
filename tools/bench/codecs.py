"""What codecs cost and what they keep: one set, its labels stored in every way, students trained on each.

    python tools/bench/codecs.py SET.H5 [--seeds 5] [KEY=VALUE ...]

SET.H5 is a set with labels of views by codec `full`. Its logits are stored again by other codecs, and as fewer
passes, from which students draw; nothing else changes, neither images nor views nor seeds. KEY=VALUE are overrides of
the set's recipe, such as data.folder=FOLDER. Labels `online` are those of `full` (tests/labels/test_labelling.py).

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
from distill.labels.view_labels import StoredLabels
from distill.pipeline import choose_device
from distill.progress import open_progress
from distill.set_recipe import read_provenance, recipe_of_set
from distill.store.reader import read_set
from distill.training.engine import Engine


@dataclass(frozen=True)
class Store:
    """A way to store labels: the codec, and which part of the passes is kept, 1 / `share`."""

    codec: CodecConfig
    share: int = 1

    @property
    def name(self) -> str:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device")
    args = parser.parse_args()
    print("| labels | bytes | of full | accuracy, 95% interval |\n|---|---|---|---|", flush=True)
    rows = []
    for store, size, result in measured(args):
        rows.append((size, result.accuracy_mean))
        if len(rows) == 1:
            full, half = rows[0], result.accuracy_ci95 or 0.0
        print(
            f"| {store.name} | {size:,} | 1 / {full[0] / size:.1f} | {100 * result.accuracy_mean:.1f} ± "
            f"{100 * (result.accuracy_ci95 or 0.0):.1f} |",
            flush=True,
        )
    within = [size for size, accuracy in rows if abs(accuracy - full[1]) <= half]
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
        protocol = Protocol(
            recipe.evaluate.students, args.seeds, (), ("soft",), full_epochs=None, seed=recipe.seed
        )
        with Engine(device, precision=recipe.precision, progress=progress) as engine:
            for store in STORES:
                soft = stored(distilled, store)
                results, _ = evaluate(
                    replace(distilled, soft=soft),
                    source,
                    protocol,
                    engine=engine,
                    progress=progress,
                    ledger=Ledger(None, identity=""),
                    views=StoredLabels(soft),
                )
                yield store, label_bytes(soft), results[0]


def stored(distilled: DistilledSet, store: Store) -> SoftLabels:
    """The set's labels by another codec, and of its first passes alone."""
    soft = distilled.soft
    assert soft is not None and soft.codec == "full" and KEPT not in soft.arrays, "labels of views, in full"
    plan = dict(soft.attributes[VIEWS])
    plan["epochs"] = max(1, plan["epochs"] // store.share)
    logits = torch.stack([decode_rows(soft, view, slice(None)) for view in range(plan["epochs"])])
    attributes = {**soft.attributes, VIEWS: plan, **store.codec.options}
    coded = encode(logits, codec=store.codec.name, **attributes)
    return replace(coded, arrays={name: np.ascontiguousarray(each) for name, each in coded.arrays.items()})


if __name__ == "__main__":
    main()
