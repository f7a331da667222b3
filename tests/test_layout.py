"""The house keeps its plan: one direction of imports, nothing heavy up front, nothing that belongs to one machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = {"distill": ROOT, "dataselect": ROOT / "selectors"}

# Every room imports only from rooms named before it, and from itself. A room is a package or a single module.
ORDER = [
    "errors",
    "files",
    "locks",
    "processes",
    "parallel",
    "randomness",
    "registry",
    "yaml_lines",
    "machine_paths",
    "training.config",
    "contracts",
    "preprocessing",
    "whitening",
    "progress",
    "recipe_problems",
    "byte_sizes",
    "recipe_overrides",
    "recipe",
    "portable",
    "set_recipe",
    "augment",
    "data",
    "text",
    "models",
    "training",
    "cache",
    "labels",
    "selection",
    "step_checks",
    "matching",
    "recovery",
    "distillers",
    "dataselect",
    "store",
    "exporting",
    "evaluation",
    "costs",
    "document_results",
    "environment",
    "run_folder",
    "report",
    "document_checks",
    "document_run",
    "document_plan",
    "dry_run",
    "pipeline",
    "command",
    "cache_commands",
    "cli",
    "__main__",
]

# A recipe is checked against the models' configurations, which it imports when it meets one.
LATE = {("recipe", "models")}

# What selectors know of distill: the cache and the small contracts.
OPEN_TO_SELECTORS = {
    "byte_sizes",
    "cache",
    "contracts",
    "errors",
    "files",
    "machine_paths",
    "parallel",
    "randomness",
    "registry",
    "selection",
    "text",
    "training.config",
}

# What says how an image is turned into numbers by a network; files and recipes must be readable without it.
TORCH_MODELS = {"models", "training", "cache", "augment"}


def module_files() -> dict[str, Path]:
    """Dotted name -> file, for both packages."""
    found = {}
    for package, root in SOURCE_ROOTS.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = module_files()


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST, *, late: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run: at import, and with `late` also those within functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not late:
            continue
        elif not for_types_only(child):
            yield from statements(child, late=late)


def imported(module: str, *, late: bool = True) -> set[str]:
    """Names of the modules that a module imports; for `from a import b`, a.b where that is a module of ours."""
    found = set()
    for statement in statements(ast.parse(MODULES[module].read_text(encoding="utf-8")), late=late):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        assert statement.level == 0, f"{module} imports relatively"
        for alias in statement.names:
            full = f"{statement.module}.{alias.name}"
            found.add(full if full in MODULES else str(statement.module))
    return found


def room(module: str) -> str | None:
    """The room of a module of ours; None for `distill` itself and for foreign modules."""
    package, _, rest = module.partition(".")
    if package == "dataselect":
        return "dataselect"
    if package != "distill" or not rest:
        return None
    return rest if rest in ORDER else rest.split(".")[0]


def edges(*, late: bool = True) -> Iterator[tuple[str, str]]:
    """(module, module of ours that it imports)."""
    for module in MODULES:
        for target in sorted(imported(module, late=late)):
            if target in MODULES and target != module:
                yield module, target


# --- the name `selectors`


def test_selectors_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "selectors" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "selectors").iterdir() if path.name != "__pycache__"] == [
        "dataselect"
    ]


@pytest.mark.parametrize("path", ["", str(ROOT)], ids=["working directory", "PYTHONPATH"])
def test_the_standard_library_keeps_its_selectors(path: str) -> None:
    """`subprocess` and `asyncio` import it, also where the checkout is the first place to look."""
    code = "import subprocess, asyncio, selectors; print(selectors.__file__)"
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert not Path(run.stdout.strip()).is_relative_to(ROOT / "selectors")


# --- directions


def test_imports_are_seen() -> None:
    """The tests below would pass on an empty graph."""
    graph = set(edges())
    assert ("distill.pipeline", "distill.registry") in graph
    assert ("dataselect.kcenter", "dataselect.features") in graph
    assert ("distill.cli", "distill.pipeline") in graph
    assert ("distill.cli", "distill.pipeline") not in set(edges(late=False))
    assert ("distill.contracts", "distill.cache") not in graph  # for types only


def test_every_room_has_its_place() -> None:
    rooms = {room(module) for module in MODULES} - {None}
    assert rooms == set(ORDER), "name a new room in ORDER, behind all that it imports"


def test_imports_go_one_way() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, target in edges()
        if (own := room(module)) is not None
        and (other := room(target)) is not None
        and ORDER.index(other) > ORDER.index(own)
        and (own, other) not in LATE
    ]
    assert not wrong


def test_a_late_import_is_late() -> None:
    early = {(room(module), room(target)) for module, target in edges(late=False)}
    assert not early & LATE
    assert {(room(module), room(target)) for module, target in edges()} >= LATE, "an exception nobody needs"


def test_no_module_imports_itself_by_a_detour() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, target in edges(late=False):
        graph[module].add(target)
    while free := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, f"in or behind a circle: {', '.join(graph)}"


def test_methods_know_nothing_of_each_other() -> None:
    """Files of methods import what methods share, never another method."""
    from distill.registry import METHODS

    files = {entry.target.split(":")[0] for entry in METHODS.values()}
    assert files <= MODULES.keys()
    assert not [edge for edge in edges() if edge[0] in files and edge[1] in files]


def test_nothing_but_names_leads_to_a_method() -> None:
    """The pipeline finds methods through the registry, so that another package can add one."""
    outside = {
        (module, target)
        for module, target in edges()
        if room(target) in ("distillers", "dataselect") and room(module) != room(target)
    }
    assert not outside


def test_selectors_know_only_the_cache_and_the_small_contracts() -> None:
    known = {room(target) for module, target in edges() if room(module) == "dataselect"}
    assert known <= OPEN_TO_SELECTORS | {"dataselect"}


@pytest.mark.parametrize("package", ["store", "recipe", "recipe_problems", "recipe_overrides", "yaml_lines"])
def test_files_and_recipes_know_no_torch_model(package: str) -> None:
    known = {
        target for module, target in edges(late=False) if room(module) == package and room(target) != package
    }
    assert not {target for target in known if room(target) in TORCH_MODELS}


def test_only_the_command_line_imports_the_command_line() -> None:
    assert {module for module, target in edges() if target == "distill.cli"} == {"distill.__main__"}


# --- weight


def test_the_command_line_imports_nothing_heavy_up_front() -> None:
    light = {"distill.cli", "distill.command", "distill.cache_commands"}
    heavy = {
        name
        for module in light
        for name in imported(module, late=False) - light
        if name.split(".")[0] not in sys.stdlib_module_names
        and name not in ("click", "distill", "distill.errors")
    }
    assert not heavy


HEAVY = ("torch", "numpy", "pydantic", "yaml", "rich", "h5py", "scipy", "sklearn")
HELP = """
import sys
from distill.cli import main
try:
    main(["--help"], standalone_mode=True)
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.parametrize(
    "code", ["import distill, sys; dir(distill)", HELP], ids=["import distill", "--help"]
)
def test_first_contact_is_light(code: str) -> None:
    report = f"print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", ["distill.recipe", "distill.report.html", "distill.evaluation.results"])
def test_recipes_and_reports_are_read_without_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_unknown_names_of_the_package_are_no_surprise() -> None:
    import distill

    assert {"run", "load", "evaluate"} <= set(dir(distill))
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        _ = distill.rum  # type: ignore[attr-defined]


# --- habits


def python_files(folders: Sequence[str] = ("distill", "selectors", "tests", "tools")) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def shown(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def matches(pattern: str) -> list[str]:
    found = re.compile(pattern)
    return [
        shown(path, number)
        for path in python_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if found.search(line)
    ]


def test_no_path_of_one_machine() -> None:
    """Home folders and mounts; those of `someone` and `user` are made up, for tests of how a home is found."""
    assert not matches(r"""["'\s](/(home|Users)/(?!someone|user)|/(root|work|mnt|media|scratch)/)""")


def test_nothing_is_left_to_do() -> None:
    marks = "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"])
    assert not matches(rf"\b({marks})\b")


def test_every_file_says_what_it_is() -> None:
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in python_files(("distill", "selectors", "tools"))
        if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None
    ]
    assert not silent


def test_no_drawers_for_odds_and_ends() -> None:
    odd = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [path for path in python_files() if path.stem in odd or path.parent.name in odd]


def test_tests_are_no_package() -> None:
    """pytest imports them by path; an `__init__.py` would give two of them one name."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
