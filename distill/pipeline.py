"""The one road of `distill run`: recipe -> source -> steps -> set.h5 -> evaluation -> report.

`run` and `evaluate` are what the commands of the same names call, and what `import distill` offers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from distill.cache import Cache, Limits, default_folder
from distill.contracts import (
    Context,
    DistilledSet,
    DocumentSelector,
    Method,
    Progress,
    Selection,
    SoftLabels,
    Source,
    StepKind,
)
from distill.costs import CostedLedger, Costs
from distill.data import open_source, open_target, with_target
from distill.document_checks import check_images, check_outputs, check_text
from distill.document_plan import plan_documents
from distill.document_results import DocumentReport
from distill.document_results import from_report as from_document_report
from distill.document_run import materialise as write_out
from distill.document_run import run_documents
from distill.dry_run import dry_run as plan_text
from distill.environment import code_revision, device_name, machine, versions
from distill.errors import DamagedDataError, InputError
from distill.evaluation.controls import check_labels
from distill.evaluation.probe import Probe
from distill.evaluation.protocol import Protocol
from distill.evaluation.protocol import evaluate as compare
from distill.evaluation.results import ArmResult, Evaluation, PairedDifference, SetBytes, from_report
from distill.evaluation.tested import check_tested, reads_target, without_learned
from distill.exporting.documents import Written
from distill.files import disk_errors
from distill.labels.codecs import label_bytes
from distill.labels.labelling import view_labels
from distill.labels.projector import check_encoder, encoder_bytes
from distill.labels.set_teachers import set_teachers
from distill.portable import refuse_absent_files, without_paths
from distill.progress import NullProgress, open_progress
from distill.recipe import LoadedRecipe, Recipe, as_dict, load_recipe, make_recipe, merged_yaml
from distill.registry import lookup, methods
from distill.report import documents as document_report
from distill.report.tables import render
from distill.report.write import write_report
from distill.run_folder import RunFolder, State
from distill.selection import evaluated_on_target, materialise
from distill.set_recipe import Made, overridden_train, read_provenance, recipe_of_set
from distill.step_checks import check_files, check_places, check_steps, step_named
from distill.store.reader import read_set
from distill.store.summary import summarise
from distill.store.writer import write_set
from distill.training.engine import Engine


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Args:
        folder: its files.
        evaluation: accuracies, differences, bytes and costs; of text, what was chosen.
        table: the evaluation as text.
        documents: the documents of the set written out, where that was asked for.
    """

    folder: RunFolder
    evaluation: Evaluation | DocumentReport
    table: str
    documents: Path | None = None


def run(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    out: Path | str | None = None,
    device: str | None = None,
    seed: int | None = None,
    resume: bool = False,
    fresh: bool = False,
    materialise: Written | None = None,
    quiet: bool = False,
) -> RunResult:
    """Run a recipe from data to an evaluated set; where the folder holds this very run finished, read its results.

    Args:
        recipe: a path, the name of a shipped recipe, or the recipe itself as plain data.
        overrides: `key=value` arguments.
        out: folder of the run; `runs/NAME` by default.
        device: `cpu`, `cuda` or `cuda:N`; by default `cuda` where there is one.
        seed: instead of the recipe's.
        resume: insist on going on with an interrupted run.
        fresh: start anew, whatever the folder holds; earlier results stay in `previous` until the run is done.
        materialise: also write the documents that were chosen, as documents.jsonl or documents.parquet; for text.
        quiet: tell warnings only.

    Raises:
        DistillError: with an exit code and what to do; see `distill.errors`.
    """
    loaded, name = resolve(recipe, overrides, seed)
    _refuse_for_images(loaded, materialise)
    folder = RunFolder(Path(out) if out else Path("runs") / name)
    check_outputs(loaded, folder.replaced)
    torch_device = _device_of(loaded, device)
    merged = merged_yaml(loaded)
    folder.check(merged, resume=resume, fresh=fresh)  # before the lock, which makes the folder
    with folder.locked():
        state = folder.open(merged, resume=resume, fresh=fresh)
        if state == "finished":
            evaluation = _read_back(folder, loaded, quiet=quiet)
        else:
            with open_progress(folder.log, quiet=quiet) as progress:
                _tell_state(folder, state, progress)
                evaluation = _run_either(loaded, folder, torch_device, progress, state=state)
            folder.finish()
        documents = None
        if materialise is not None:
            with open_progress(folder.log, quiet=quiet) as progress:
                documents = write_out(folder, materialise, progress)
    return RunResult(folder, evaluation, _rendered(evaluation), documents)


def _tell_state(folder: RunFolder, state: State, progress: Progress) -> None:
    if state == "interrupted":
        progress.note(f"going on with the interrupted run in {folder.root}")
    if folder.previous.exists():
        progress.note(f"earlier results are kept in {folder.previous} until this run is finished")


def _run_either(
    recipe: Recipe, folder: RunFolder, device: torch.device, progress: Progress, *, state: State
) -> Evaluation | DocumentReport:
    """The road of documents, or that of images."""
    steps = make_steps(recipe)
    if recipe.of_text:
        return run_documents(recipe, check_text(recipe, steps), folder, progress, state=state)
    with workshop(recipe, device, progress) as shop:
        return _run(recipe, check_images(recipe, steps), folder, shop, state=state)


def _rendered(evaluation: Evaluation | DocumentReport) -> str:
    return (
        document_report.render(evaluation) if isinstance(evaluation, DocumentReport) else render(evaluation)
    )


def _refuse_for_images(recipe: Recipe, materialise: Written | None) -> None:
    if materialise is not None and not recipe.of_text:
        raise InputError(
            "documents are written of sets of documents",
            where="--materialise",
            found=materialise,
            fix="write images with `distill export SET.H5 --to folder`",
        )


def _device_of(recipe: Recipe, name: str | None) -> torch.device:
    """The device of a run; text is read by processors alone."""
    if recipe.of_text and name not in (None, "cpu"):
        raise InputError(
            "text is read by processors, and no device serves", where="--device", found=name, allowed="cpu"
        )
    return torch.device("cpu") if recipe.of_text else choose_device(name)


def _read_back(folder: RunFolder, recipe: Recipe, *, quiet: bool) -> Evaluation | DocumentReport:
    """What the finished run in the folder found."""
    with open_progress(None, quiet=quiet) as progress:
        progress.note(f"the run in {folder.root} is finished, these are its results; --fresh runs it again")
    where = str(folder.report_json)
    try:
        report = json.loads(folder.report_json.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedDataError("the report is damaged", where=where, fix="run again with --fresh") from error
    return from_document_report(report, where=where) if recipe.of_text else from_report(report, where=where)


def dry_run(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    out: Path | str | None = None,
    device: str | None = None,
    seed: int | None = None,
    resume: bool = False,
    fresh: bool = False,
) -> str:
    """What `run` with the same arguments would do, as text; nothing is run or written."""
    loaded, name = resolve(recipe, overrides, seed)
    folder = RunFolder(Path(out) if out else Path("runs") / name)
    check_outputs(loaded, folder.replaced)
    state = folder.check(merged_yaml(loaded), resume=resume, fresh=fresh)
    steps, on = make_steps(loaded), _device_of(loaded, device)
    if loaded.of_text:
        return plan_documents(loaded, check_text(loaded, steps), folder, state=state)
    return plan_text(loaded, check_images(loaded, steps), folder, on, state=state)


def resolve(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str], seed: int | None
) -> tuple[Recipe, str]:
    """The checked recipe and a name for its run."""
    if seed is not None:
        overrides = [*overrides, f"seed={seed}"]
    if isinstance(recipe, Mapping):
        loaded, name = make_recipe(recipe, overrides), "recipe"
    else:
        loaded, name = load_recipe(str(recipe), overrides).recipe, Path(recipe).stem
    refuse_absent_files(loaded)
    return loaded, name


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError("unknown device", where="--device", found=name, allowed="cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices"
        raise InputError(f"there is no device {name}", where="--device", found=found, fix="use --device cpu")
    return device


@dataclass(frozen=True)
class Workshop:
    """What every stage of one run shares."""

    recipe: Recipe
    engine: Engine
    cache: Cache
    costs: Costs
    progress: Progress

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def context(self, scratch: Path) -> Context:
        """What a method may use, with a folder of its own."""
        return Context(
            seed=self.recipe.seed,
            device=self.device,
            cache=self.cache,
            engine=self.engine,
            costs=self.costs,
            progress=self.progress,
            train=self.recipe.train,
            scratch=scratch,
        )


@contextmanager
def workshop(recipe: Recipe, device: torch.device, progress: Progress) -> Iterator[Workshop]:
    """Open engine, cache and ledger of costs; worker processes end with it."""
    folder = Path(recipe.cache.folder) if recipe.cache.folder else default_folder()
    with Engine(device, precision=recipe.precision, progress=progress) as engine:
        asked, costs = recipe.cache, Costs(engine)
        cache = Cache(
            folder,
            device=device,
            progress=progress,
            device_bytes=asked.device_bytes,
            host_bytes=asked.host_bytes,
            limits=Limits(work_bytes=asked.work_bytes, non_finite=asked.non_finite),
            costs=costs,
        )
        yield Workshop(recipe, engine, cache, costs, progress)


def _run(
    recipe: Recipe, steps: Sequence[Method], folder: RunFolder, shop: Workshop, *, state: State
) -> Evaluation:
    check_places(steps, recipe)
    check_files(steps)
    with shop.costs.stage("data"):
        source = _open(recipe, shop.progress)
    check_steps(steps, source.without_test(), recipe.train)
    origin = _origin(source, shop)
    if state == "interrupted":
        folder.refuse_other_origin(origin)
    else:
        folder.keep_origin(origin)
    result = _run_steps(steps, source.without_test(), folder, shop)
    distilled = _finish_set(result, source, recipe)
    write_set(distilled, folder.set)
    shop.progress.note(f"wrote {folder.set}", images=len(distilled))
    return _evaluate(distilled, source, folder.set, shop, ledger=folder.ledger, out=folder)


def _open(recipe: Recipe, progress: Progress) -> Source:
    """The source of a recipe, with its target; refused where students cannot be tested as they are to be."""
    source = open_source(recipe.data, seed=recipe.seed, progress=progress)  # type: ignore[arg-type]
    if recipe.target is None:
        return source
    source = with_target(source, open_target(recipe.target, source, seed=recipe.seed, progress=progress))
    asked = recipe.evaluate
    check_tested(source, asked.on, asked.against)
    source, note = without_learned(source, asked.on)
    if note is not None:
        progress.warn(note)
        source = replace(source, notes=(*source.notes, note))
    return source


def _origin(source: Source, shop: Workshop) -> dict[str, Any]:
    """Everything besides the recipe that decides a run's results."""
    return {
        "data": _fingerprints(source),
        **({} if source.target is None else {"target": _fingerprints(source.target)}),
        "device": device_name(shop.device),
        "dtype": str(shop.engine.dtype),
        "versions": versions(),
        "code": code_revision(),
    }


def _fingerprints(source: Source) -> dict[str, str]:
    return {
        "train": source.train.fingerprint,
        "valid": source.valid.fingerprint,
        "test": source.test.fingerprint,
        "classes": sha256("\0".join(source.classes).encode()).hexdigest(),
    }


def make_steps(recipe: Recipe) -> list[Method | DocumentSelector]:
    """The recipe's methods with their configurations."""
    known = methods()
    return [lookup(step.method, known, what="method").load()(step.config) for step in recipe.steps]


def _run_steps(
    steps: Sequence[Method], source: Source, folder: RunFolder, shop: Workshop
) -> DistilledSet | Selection:
    """Run the steps in order; those that a resumed run has finished are read back."""
    result: DistilledSet | Selection | None = None
    for number, (step, title) in enumerate(zip(steps, _stage_titles(steps), strict=True)):
        kept = folder.step(number)
        if kept.exists():
            shop.progress.note(f"{title}: finished before the interruption")
            result = _read_step(kept, step.kind)
            shop.costs.stages[title] = folder.step_cost(number)
            continue
        scratch = folder.scratch(number)
        with disk_errors(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
        ctx = shop.context(scratch)
        with shop.costs.stage(title), step_named(number, step):
            result = step.run(ctx, source, result)
        folder.keep_cost(number, shop.costs.stages[title])
        write_set(_as_set(result, source, shop.recipe), kept)
    assert result is not None, "a recipe has a step"
    return result


def _stage_titles(steps: Sequence[Method]) -> list[str]:
    """What the steps are called where costs are told; of several alike each has its number."""
    plain = [f"{step.kind} {step.name}" for step in steps]
    return [
        title if plain.count(title) == 1 else f"{title} (step {number})" for number, title in enumerate(plain)
    ]


def _read_step(path: Path, kind: StepKind) -> DistilledSet | Selection:
    kept = read_set(path)
    if kind == "distiller":
        return kept
    assert kept.selection is not None, "a selector's result was kept with its selection"
    return kept.selection


def _as_set(result: DistilledSet | Selection, source: Source, recipe: Recipe) -> DistilledSet:
    return materialise(result, source, recipe.train) if isinstance(result, Selection) else result


def _finish_set(result: DistilledSet | Selection, source: Source, recipe: Recipe) -> DistilledSet:
    """The set with its provenance: nothing of one machine or moment, so that the same seed gives the same bytes."""
    provenance = {
        "recipe": without_paths(recipe),
        "seed": recipe.seed,
        "source": {
            "name": source.name,
            "train_fingerprint": source.train.fingerprint,
            "train_images": len(source.train),
            "notes": list(source.notes),
        },
        "versions": versions(),
        "code": code_revision(),
    }
    made = _as_set(result, source, recipe)
    if made.provenance:
        provenance["method"] = dict(made.provenance)
    return replace(made, provenance=provenance)


def evaluate(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    students: Sequence[str] | None = None,
    seeds: int | None = None,
    against: Sequence[str] | None = None,
    regimes: Sequence[str] | None = None,
    encoder: Path | str | None = None,
    out: Path | str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Train students on a set and on its controls, and compare.

    Args:
        path: the set.
        overrides: `key=value` changes to the set's recipe, such as `data.folder=...` or `train.epochs=100`.
        students, seeds, against, regimes: instead of the recipe's `evaluate`.
        encoder: the weights of the public encoder that labels the set, where a projector does.
        out: also write report.json and report.html into this folder, which must not hold another set.
        device, quiet: as for `run`.

    Raises:
        InputError: the set cannot be compared with these data, or another run or set has the folder.
        DamagedDataError: the set is damaged.
    """
    path = Path(path)
    distilled = read_set(path)
    if encoder is not None:
        check_encoder(distilled.soft, Path(encoder))
    folder = None if out is None else RunFolder(Path(out))
    arguments = [*overrides, *_asked(students, seeds, against, regimes)]
    with (
        _kept_for(path, folder),
        open_progress(None, quiet=quiet) as progress,
    ):
        made = read_provenance(distilled, where=str(path))
        loaded, plain = _recipe_to_evaluate(path, made, arguments, progress)
        recipe = loaded.recipe
        _refuse_nothing(recipe)
        refuse_absent_files(recipe, sections=("evaluate",))
        distilled = replace(distilled, train=overridden_train(distilled.train, loaded, plain))
        with workshop(recipe, choose_device(device), progress) as shop:
            with shop.costs.stage("data"):
                source = _open(recipe, progress)
            if made.train_fingerprint not in (None, source.train.fingerprint):
                progress.warn("these are not the training data that the set was made from")
            encoding = None if encoder is None else Path(encoder)
            return _evaluate(distilled, source, path, shop, ledger=None, out=folder, encoder=encoding)


def _recipe_to_evaluate(
    path: Path, made: Made, arguments: Sequence[str], progress: Progress
) -> tuple[LoadedRecipe, LoadedRecipe]:
    """`recipe_of_set`, without its target where the evaluation reads none: the set may lack the path to it."""
    others = [argument for argument in arguments if not argument.startswith("target")]
    bare, _ = recipe_of_set(path, made, others, progress=NullProgress(), without=("target",))
    asked = bare.recipe.evaluate
    if not reads_target(asked.on, asked.against):
        both = recipe_of_set(path, made, others, progress=progress, without=("target",))
        short, plain = (
            replace(each, recipe=each.recipe.model_copy(update={"target": None})) for each in both
        )
        return short, plain
    loaded, plain = recipe_of_set(path, made, arguments, progress=progress)
    if loaded.recipe.target is None:
        raise InputError(
            "students are to be tested on a target, or beside images of its classes, and the set's recipe names none",
            where="evaluate",
            found=f"on: {asked.on}, against: {', '.join(asked.against)}",
            fix="name it, for example target.name=folder target.folder=FOLDER, or set evaluate.on=data",
        )
    return loaded, plain


def _refuse_nothing(recipe: Recipe) -> None:
    """Raise InputError where a recipe tests no student: nothing is left to evaluate."""
    if recipe.evaluate.on == "nothing":
        raise InputError(
            "the set's recipe trains no students",
            where="evaluate.on",
            found="nothing",
            allowed="data; target or transfer where the recipe names a target",
            fix="say whose test split to take: evaluate.on=data",
        )


def _set_bytes(sizes: Mapping[str, int], soft: SoftLabels | None) -> SetBytes:
    own = {name: sizes[name] for name in ("images", "labels", "aux")}
    encoder = encoder_bytes(soft)
    if soft is None or not encoder:
        return SetBytes(**own)
    return SetBytes(**own, adapter=label_bytes(soft), encoder=encoder)


def _asked(
    students: Sequence[str] | None,
    seeds: int | None,
    against: Sequence[str] | None,
    regimes: Sequence[str] | None,
) -> list[str]:
    """Options of `evaluate` as `key=value` arguments."""
    lists = {"students": students, "against": against, "regimes": regimes}
    chosen = [] if seeds is None else [f"evaluate.seeds={seeds}"]
    return chosen + [
        f"evaluate.{key}=[{', '.join(names)}]" for key, names in lists.items() if names is not None
    ]


@contextmanager
def _kept_for(path: Path, folder: RunFolder | None) -> Iterator[None]:
    """Keep others out of the folder of a report, and refuse the folder of another set."""
    if folder is None:
        yield
        return
    with folder.locked():
        folder.refuse_other_set(summarise(path, verify=False)["content_sha256"])
        yield


def _evaluate(
    distilled: DistilledSet,
    source: Source,
    path: Path,
    shop: Workshop,
    *,
    ledger: Path | None,
    out: RunFolder | None,
    encoder: Path | None = None,
) -> Evaluation:
    """Compare, and write the report where a folder is given."""
    summary = summarise(path, verify=False)
    results: tuple[ArmResult, ...] = ()
    paired: tuple[PairedDifference, ...] = ()
    if shop.recipe.evaluate.on != "nothing":
        tested = evaluated_on_target(source) if shop.recipe.evaluate.on == "target" else source
        identity = summary["content_sha256"]
        results, paired = _compare(distilled, tested, shop, identity=identity, ledger=ledger, encoder=encoder)
    target = () if source.target is None else source.target.notes
    evaluation = Evaluation(
        results=results,
        paired=paired,
        bytes=_set_bytes(summary["bytes"], distilled.soft),
        cost=dict(shop.costs.stages),
        recipe=as_dict(shop.recipe),
        train=distilled.train.model_dump(mode="json"),
        environment=machine(shop.device),
        notes=(*source.notes, *(f"target: {note}" for note in target)),
        images_per_class=tuple(distilled.labels.bincount(minlength=len(distilled.classes)).tolist()),
    )
    if out is not None:
        write_report(evaluation, distilled, json_path=out.report_json, html_path=out.report_html)
    return evaluation


def _compare(
    distilled: DistilledSet,
    source: Source,
    shop: Workshop,
    *,
    identity: str,
    ledger: Path | None,
    encoder: Path | None,
) -> tuple[tuple[ArmResult, ...], tuple[PairedDifference, ...]]:
    """Train and test the students of every arm."""
    asked = shop.recipe.evaluate
    probe = Probe(source, distilled.preprocessing, shop.device) if asked.on == "transfer" else None
    measured = source.test.fingerprint if probe is None else probe.identity
    protocol = Protocol(
        students=asked.students,
        seeds=asked.seeds,
        against=asked.against,
        regimes=asked.regimes,
        full_epochs=asked.full_epochs,
        seed=shop.recipe.seed,
    )
    with (
        shop.costs.stage("evaluate"),
        # Labelling has nothing to keep: teachers are the cache's, and labels that students share are this evaluation's.
        TemporaryDirectory(prefix="distill-") as scratch,
    ):
        ctx = shop.context(Path(scratch))
        check_labels(distilled, asked.regimes, asked.against)
        soft = asked.regimes is None or set(asked.regimes) != {"hard"}
        teachers = None
        if "random_soft" in asked.against:
            teachers = set_teachers(ctx, source.without_test(), distilled, encoder=encoder)
        views = None
        if soft:
            students = asked.seeds * len(set(asked.students))
            views = view_labels(
                ctx,
                source.without_test(),
                distilled,
                teachers=teachers,
                encoder=encoder,
                students=students,
            )
        return compare(
            distilled,
            source,
            protocol,
            engine=shop.engine,
            progress=shop.progress,
            # An accuracy belongs to a set and to the images that it was measured on.
            ledger=CostedLedger(ledger, identity=f"{identity} on {measured}", costs=shop.costs),
            probe=probe,
            views=views,
            labelled=None if teachers is None else teachers.label,
        )
