"""What every page of ours shares: the shell that forbids scripts and network, sections, tables, cost, notes, details.

No scripts, no network: a Content-Security-Policy in the page forbids both. Text from outside passes `html.escape`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from distill.evaluation.results import StageCost
from distill.report.style import CSS
from distill.report.tables import Table, cost_table
from distill.yaml_lines import dump

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, headline: str, sections: Iterable[str]) -> str:
    """The page; empty sections are left out.

    Args:
        title: plain text, such as `digits: soft_label`.
        headline: plain text, one sentence.
        sections: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="kind">{escape(title)}</p>'
        f"<h1>{escape(headline)}</h1></header>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, *content: str) -> str:
    """A part of the page; `content` is HTML."""
    return f"<section><h2>{escape(heading)}</h2>{''.join(content)}</section>"


def quiet(text: str) -> str:
    """A remark."""
    return f'<p class="quiet">{escape(text)}</p>'


def table_of(table: Table) -> str:
    """A table, without its heading."""
    sides = [' class="right"' if name in table.right else "" for name in table.columns]
    head = "".join(
        f'<th scope="col"{side}>{escape(name)}</th>' for name, side in zip(table.columns, sides, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(_cell(text, side) for text, side in zip(row, sides, strict=True)) + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(text: str, side: str) -> str:
    if text == "excludes 0":
        side = ' class="excludes"'
    return f"<td{side}>{escape(text)}</td>"


def cost_section(cost: Mapping[str, StageCost]) -> str:
    """What each stage took; empty where none is told."""
    if not cost:
        return ""
    cached = any(each.cached for each in cost.values())
    text = "Stages from the cache count what an earlier run paid, where that is known." if cached else ""
    return section("Cost", table_of(cost_table(cost)), quiet(text) if text else "")


def notes_section(notes: Sequence[str]) -> str:
    """What a reader must know; empty where there is nothing."""
    if not notes:
        return ""
    return section("Notes", f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>")


def details(unfolded: Mapping[str, Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """Plain data as YAML under headings, such as the recipe, and the environment."""
    blocks = "".join(
        f"<details open><summary>{escape(heading)}</summary>"
        f'<pre class="card">{escape(dump(dict(facts)))}</pre></details>'
        for heading, facts in unfolded.items()
    )
    told = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in _leaves(environment)
    )
    return f"<section>{blocks}<details open><summary>Environment</summary><dl>{told}</dl></details></section>"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested mapping, in its order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
