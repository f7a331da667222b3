"""The command line. Nothing heavy is imported before a command runs, so that --help answers at once.

Exit codes: 0 done, 2 the user's input, 3 damaged data, 4 out of memory, 130 interrupted; 1 is a defect of ours.
"""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import click

from distill import __version__
from distill.cache_commands import cache
from distill.command import Guarded, debug_option

_LEAST_COLUMN = 30  # characters, below which text is left to the terminal to wrap

device_option = click.option(
    "--device", metavar="D", help="cpu, cuda or cuda:N; default: cuda where present."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="distill")
def main() -> None:
    """Turn a large dataset into a small one that trains nearly as well, and prove it.

    `distill run digits` is the whole job on a small example; `distill recipes ls` lists what else is shipped.
    """


def _what_a_run_leaves(params: dict[str, Any]) -> str:
    if params["dry_run"]:
        return ""
    return f"the same command{' without --fresh' if params['fresh'] else ''} goes on from here"


@main.command(cls=Guarded, interrupted=_what_a_run_leaves)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run; default: runs/RECIPE.")
@device_option
@click.option("--seed", type=click.IntRange(min=0), help="Instead of the recipe's seed.")
@click.option("--dry-run", is_flag=True, help="Resolve and estimate everything, run nothing.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run; an error if there is none.")
@click.option("--fresh", is_flag=True, help="Start anew, replacing whatever run the folder holds.")
@click.option(
    "--materialise",
    type=click.Choice(["jsonl", "parquet"]),
    help="Of text, also write the chosen documents into the folder, as documents.jsonl or documents.parquet.",
)
@click.option("--quiet", "-q", is_flag=True, help="Results, warnings and errors only.")
@debug_option
def run(
    recipe: str,
    overrides: tuple[str, ...],
    out: Path | None,
    device: str | None,
    seed: int | None,
    dry_run: bool,
    resume: bool,
    fresh: bool,
    materialise: str | None,
    quiet: bool,
) -> None:
    """Run RECIPE: from data to an evaluated set.

    RECIPE is a path, or the name of a shipped recipe. KEY=VALUE overrides one of its keys, for example
    `distill run digits steps.0.ipc=5 evaluate.seeds=3`. The folder then holds set.h5, report.json, report.html,
    recipe.yaml and log.jsonl.

    A run that was interrupted goes on where it was when the same command is given again.
    """
    if resume and fresh:
        raise click.UsageError("--resume and --fresh exclude each other")
    from distill import pipeline

    if dry_run:
        plan = pipeline.dry_run(
            recipe, overrides, out=out, device=device, seed=seed, resume=resume, fresh=fresh
        )
        click.echo(plan)
        return
    result = pipeline.run(
        recipe,
        overrides,
        out=out,
        device=device,
        seed=seed,
        resume=resume,
        fresh=fresh,
        materialise=materialise,  # type: ignore[arg-type]  # click lets nothing else through
        quiet=quiet,
    )
    click.echo(result.table)
    click.echo()
    for path in (result.folder.set, result.folder.report_json, result.folder.report_html, result.documents):
        if path is not None:
            click.echo(str(path))


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(part.strip() for part in value.split(",") if part.strip())


@main.command(
    cls=Guarded, interrupted=lambda _: "the same command starts again, with what the cache has kept"
)
@click.argument("path", metavar="SET.H5", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--students", metavar="A,B", callback=_names, help="Model names; default: the recipe's.")
@click.option(
    "--seeds", type=click.IntRange(min=2), help="Networks an arm and student; default: the recipe's."
)
@click.option(
    "--against",
    metavar="A,B",
    callback=_names,
    help="Controls: random, random_soft, random_target, full; default: the recipe's.",
)
@click.option(
    "--regime", metavar="A,B", callback=_names, help="Labels: hard, soft, teacher; default: all there are."
)
@click.option(
    "--encoder",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Weights of the public encoder that labels the set, where a projector does.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Also write report.json and report.html there; not where another set lies.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of the table.")
@device_option
@click.option("--quiet", "-q", is_flag=True, help="Results, warnings and errors only.")
@debug_option
def evaluate(
    path: Path,
    overrides: tuple[str, ...],
    students: tuple[str, ...] | None,
    seeds: int | None,
    against: tuple[str, ...] | None,
    regime: tuple[str, ...] | None,
    encoder: Path | None,
    out: Path | None,
    as_json: bool,
    device: str | None,
    quiet: bool,
) -> None:
    """Train students on SET.H5 and on its controls, and compare.

    The data are those of the set's recipe; KEY=VALUE changes it, for example `data.folder=/where/they/are` or
    `train.epochs=100`. Where the data lie is not in a set: it is read from recipe.yaml beside it, where that is the
    set's own, or given so. Steps and cache are not read.
    """
    from distill import pipeline

    evaluation = pipeline.evaluate(
        path,
        overrides,
        students=students,
        seeds=seeds,
        against=against,
        regimes=regime,
        encoder=encoder,
        out=out,
        device=device,
        quiet=quiet,
    )
    if as_json:
        import json

        from distill.evaluation.results import to_report

        click.echo(json.dumps(to_report(evaluation), indent=2))
        return
    from distill.report.tables import render

    click.echo(render(evaluation))


@main.command(cls=Guarded)
@click.argument("path", metavar="SET.H5", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--verify", is_flag=True, help="Read everything and check every sha256.")
@debug_option
def inspect(path: Path, as_json: bool, verify: bool) -> None:
    """Show what SET.H5 holds: shapes, bytes, provenance."""
    from distill.store.summary import describe, summarise

    summary = summarise(path, verify=verify)
    if as_json:
        import json

        click.echo(json.dumps(summary, indent=2))
        return
    click.echo(describe(summary))


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    from distill.byte_sizes import parse_bytes
    from distill.errors import InputError

    try:
        return parse_bytes(value)
    except InputError as error:
        raise click.BadParameter(f"{value!r}; allowed: {error.allowed}") from error


@main.command(cls=Guarded, interrupted=lambda _: "nothing was written")
@click.argument("path", metavar="SET.H5", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[data.KEY=VALUE]...")
@click.option(
    "--to",
    type=click.Choice(["folder", "webdataset", "indices", "jsonl", "parquet"]),
    required=True,
    help="OUT/CLASS/IMAGE, tar shards in OUT, or OUT as a file of JSON lines; jsonl and parquet of documents.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="What to write; nothing is there yet."
)
@click.option(
    "--originals/--pixels",
    default=None,
    help="The files that were selected, or the images as the set holds them, as PNG; "
    "default: originals of a selection. With --to indices: insist on paths of originals, or leave them out.",
)
@click.option(
    "--link",
    type=click.Choice(["hard", "symbolic"]),
    help="Link to the original files instead of copying them.",
)
@click.option(
    "--shard-bytes",
    metavar="SIZE",
    callback=_bytes,
    help="The most that a shard takes, such as 500MB, but for one sample that alone takes more: a shard holds at "
    "least one; default: 1GB.",
)
@click.option("--quiet", "-q", is_flag=True, help="Warnings and errors only.")
@debug_option
def export(
    path: Path,
    overrides: tuple[str, ...],
    to: str,
    out: Path,
    originals: bool | None,
    link: str | None,
    shard_bytes: int | None,
    quiet: bool,
) -> None:
    """Write SET.H5 as files that other programs read.

    Of a selection, the original files are written, at full resolution: they are found in the data of the set's
    recipe, and each is compared with the set on its way; nothing is left under OUT unless all agree. Where the data
    lie is read from recipe.yaml beside the set, where that is the set's own, or given as `data.folder=...`. Nothing
    is downloaded unless `data.download=true` is given.

    \b
    folder      OUT/CLASS/IMAGE, and OUT/indices.jsonl with indices, weights, scores and paths
    webdataset  OUT/train-*.tar with the same in a .json beside each image, and OUT/classes.txt
    indices     OUT alone, a JSON object a line, in the order of the set
    jsonl       of documents: OUT alone, the records as they stand, in the order of the corpus
    parquet     of documents: OUT alone, with the columns text, file, row and score

    Among what is told of an image, `row` is its number in the data as they were found, which `costs.file` uses too;
    `index` is its number in the training split, which classes, caps and cuts made shorter.

    `distill run` reads the first two with data.name=folder and with data.name=webdataset data.test=0.2. It cuts a
    fifth of each class off as test images and a tenth of the rest for validation, and classes of one or two images
    are too small for that. For a selection to be read whole, give data.valid=0 and bring test images: write the
    folder to FOLDER/train and put them into FOLDER/test/CLASS, or name other shards, data.test=[SHARD,...].

    The disk must hold what is written; originals that are members of tar shards twice, since they leave in another
    order than they are read.
    """
    from distill.exporting import export as write

    write(
        path,
        overrides,
        to=to,  # type: ignore[arg-type]  # click lets nothing else through
        out=out,
        originals=originals,
        link=link,  # type: ignore[arg-type]
        shard_bytes=shard_bytes,
        quiet=quiet,
    )
    click.echo(str(out))


main.add_command(cache)


@main.group()
def recipes() -> None:
    """Shipped recipes."""


@recipes.command("ls", cls=Guarded)
@debug_option
def recipes_ls() -> None:
    """List the shipped recipes."""
    from distill.recipe import recipe_names, recipe_text

    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        click.echo(_wrapped(f"{name:<{width}}  {_about(recipe_text(name))}", indent=width + 2))


def _about(recipe: str) -> str:
    """The first sentence of the comment that a shipped recipe begins with; it may take several lines."""
    lines = itertools.takewhile(lambda line: not line.startswith("# Run:"), recipe.splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]


def _wrapped(line: str, *, indent: int) -> str:
    """In a terminal, wrapped at words into the last column, where that has room; one line in a file or a pipe.

    Not cut: what tells recipes apart often stands at the end.
    """
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or width < indent + _LEAST_COLUMN:
        return line
    blank = " " * indent
    return textwrap.fill(line, width, subsequent_indent=blank, break_long_words=False, break_on_hyphens=False)


@recipes.command("show", cls=Guarded)
@click.argument("name")
@debug_option
def recipes_show(name: str) -> None:
    """Print a shipped recipe, for example to save and change it."""
    from distill.recipe import recipe_text

    click.echo(recipe_text(name), nl=False)


@main.group(invoke_without_command=True)
@click.pass_context
def methods(ctx: click.Context) -> None:
    """Methods: selectors and distillers."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(methods_ls)


@methods.command("ls", cls=Guarded)
@debug_option
def methods_ls() -> None:
    """List the methods that a recipe's steps may name."""
    from distill.registry import methods as registered

    entries = registered().values()
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        click.echo(f"{entry.name:<{width}}  {entry.kind:<9}  {entry.summary}")


@main.command(cls=Guarded)
@debug_option
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from distill.recipe import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


if __name__ == "__main__":
    sys.exit(main())
