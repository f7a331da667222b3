"""`distill cache`: what the cache holds, whether it is whole, and making room."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from distill.command import Guarded, debug_option

folder_option = click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="The cache's folder; default: DISTILL_CACHE, else the user's cache folder.",
)


@click.group()
def cache() -> None:
    """The cache of features, gradients, statistics and trained networks."""


@cache.command("ls", cls=Guarded)
@folder_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@debug_option
def cache_ls(folder: Path | None, as_json: bool) -> None:
    """List what the cache holds, the last used first."""
    from distill.cache.upkeep import entries

    place = _place(folder)
    found = entries(place)
    if as_json:
        import json

        click.echo(json.dumps([_plain(entry) for entry in found], indent=2))
        return
    _tell(place, found)


@cache.command("gc", cls=Guarded)
@folder_option
@click.option(
    "--max-bytes", metavar="SIZE", help="Remove what was unused longest until this much is left: 20GB."
)
@click.option(
    "--unused-days", type=click.FloatRange(min=0), help="Remove what was not used for so many days."
)
@click.option("--dry-run", is_flag=True, help="Tell what would be removed, remove nothing.")
@debug_option
def cache_gc(folder: Path | None, max_bytes: str | None, unused_days: float | None, dry_run: bool) -> None:
    """Remove what earlier versions made, what killed runs left, and what the options name.

    Whatever is removed is computed again when a run asks for it. Refused while a run uses the cache.
    """
    from distill.byte_sizes import parse_bytes
    from distill.cache.upkeep import entries, remove, surplus
    from distill.report.quantities import size

    if unused_days is not None and not math.isfinite(unused_days):
        raise click.BadParameter("a finite number of days is needed", param_hint="--unused-days")
    place = _place(folder)
    limit = None if max_bytes is None else parse_bytes(max_bytes)
    unwanted = surplus(entries(place), max_bytes=limit, unused_days=unused_days)
    if not dry_run:
        remove(place, unwanted)
    for entry in unwanted:
        click.echo(_line(entry))
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{len(unwanted)} entries, {size(sum(entry.bytes for entry in unwanted))}, {verb}")


@cache.command("verify", cls=Guarded)
@folder_option
@click.option(
    "--remove", "removes", is_flag=True, help="Remove damaged files; they are computed again when needed."
)
@debug_option
def cache_verify(folder: Path | None, removes: bool) -> None:
    """Compare every file with its checksum. Exit code 3 where one is damaged."""
    from distill.cache.upkeep import damaged, remove_damaged
    from distill.errors import DamagedDataError

    place = _place(folder)
    checked = list(damaged(place))
    broken = [path for path, whole in checked if not whole]
    if broken and removes:
        remove_damaged(place, broken)
    for path in broken:
        click.echo(f"damaged: {path}")
    click.echo(f"{len(checked)} files, {len(checked) - len(broken)} whole")
    if broken and not removes:
        raise DamagedDataError(
            f"{len(broken)} files of the cache are damaged",
            where=str(place),
            fix="run distill cache verify --remove; they are then computed again when needed",
        )
    if broken:
        click.echo(f"{len(broken)} damaged files removed")


def _place(folder: Path | None) -> Path:
    from distill.cache.folder import default_folder

    return folder or default_folder()


def _tell(place: Path, found: list[Any]) -> None:
    from distill.report.quantities import size

    for entry in found:
        click.echo(_line(entry))
    click.echo(f"{len(found)} entries, {size(sum(entry.bytes for entry in found))} in {place}")


def _line(entry: Any) -> str:
    from datetime import datetime

    from distill.report.quantities import size

    used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
    marks = "obsolete" if entry.obsolete else "" if entry.whole == 1 else f"{entry.whole:.0%} there"
    return f"{entry.kind:<15} {size(entry.bytes):>8}  {used}  {entry.told}{'  ' if marks else ''}{marks}"


def _plain(entry: Any) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "path": str(entry.path),
        "told": entry.told,
        "bytes": entry.bytes,
        "used": entry.used,
        "whole": entry.whole,
        "obsolete": entry.obsolete,
    }
