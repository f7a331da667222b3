"""Names: looked up without importing, told with the nearest, and open to installed packages."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from distill import registry
from distill.errors import InputError
from distill.registry import DATA, METHODS, MODELS, Entry, lookup, methods, nearest

GROUP = "distill.methods"
Install = Callable[..., None]


class Distribution:
    """As much of an installed package as an entry point shows."""

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(name, "module:Class", package="plugin"): an entry point more in the group of methods."""
    points: list[EntryPoint] = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr(registry, "entry_points", entry_points)

    def install(name: str, target: str, *, package: str = "plugin", group: str = GROUP) -> None:
        point = EntryPoint(name, target, group)
        vars(point)["dist"] = Distribution(package)  # as importlib.metadata sets it
        points.append(point)

    return install


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An importable module with one method."""
    module = types.ModuleType("made_up_plugin")

    class Mine:
        """Does what is mine.

        And more.
        """

        name = "mine"
        kind = "selector"

    module.Mine = Mine  # type: ignore[attr-defined]
    module.Bare = type("Bare", (), {"kind": "distiller", "__doc__": None})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up_plugin", module)
    return module


# --- our own


@pytest.mark.parametrize("table", [METHODS, DATA, MODELS], ids=["methods", "data", "models"])
def test_every_name_leads_to_a_class_that_explains_itself(table: dict[str, Entry]) -> None:
    for name, entry in table.items():
        cls = entry.load()
        assert entry.name == name
        assert isinstance(cls, type)
        assert entry.summary and not entry.summary.endswith(".")


@pytest.mark.parametrize("table", [METHODS, DATA], ids=["methods", "data"])
def test_classes_have_the_name_they_are_registered_under(table: dict[str, Entry]) -> None:
    assert {name: entry.load().name for name, entry in table.items()} == {name: name for name in table}


def test_listing_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from distill.registry import methods;"
        "[(e.kind, e.summary) for e in methods().values()];"
        "print([m for m in ('torch', 'numpy', 'dataselect') if m in sys.modules])"
    )
    root = str(Path(__file__).parents[1])
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- looking up


def test_lookup_finds() -> None:
    assert lookup("kcenter", METHODS, what="method") is METHODS["kcenter"]


@pytest.mark.parametrize(
    ("name", "fix"), [("kcentre", "did you mean 'kcenter'?"), ("soft-label", "did you mean 'soft_label'?")]
)
def test_an_unknown_name_is_told_with_the_nearest(name: str, fix: str) -> None:
    with pytest.raises(InputError, match=f"unknown method '{name}'") as caught:
        lookup(name, METHODS, what="method")
    assert caught.value.fix == fix
    assert caught.value.found == name
    assert caught.value.allowed == ", ".join(sorted(METHODS))


def test_a_name_like_no_other_is_told_without_a_guess() -> None:
    with pytest.raises(InputError) as caught:
        lookup("qqqq", METHODS, what="method")
    assert caught.value.fix is None


@pytest.mark.parametrize(
    ("name", "known", "wanted"),
    [
        ("herdin", ["random", "herding"], "herding"),
        ("x", ["random"], None),
        ("", ["random"], None),
        ("a", [], None),
    ],
)
def test_nearest(name: str, known: list[str], wanted: str | None) -> None:
    assert nearest(name, known) == wanted


# --- installed packages


def test_a_method_of_an_installed_package_appears(install: Install, plugin: types.ModuleType) -> None:
    install("mine", "made_up_plugin:Mine")
    entry = methods()["mine"]
    assert (entry.kind, entry.summary, entry.package) == ("selector", "Does what is mine.", "plugin")
    assert entry.load() is plugin.Mine
    assert list(methods()) == [*METHODS, "mine"]
    assert "mine" not in METHODS


def test_a_class_without_a_docstring_has_no_summary(install: Install, plugin: types.ModuleType) -> None:
    install("bare", "made_up_plugin:Bare")
    assert methods()["bare"].summary == ""


def test_entry_points_of_other_groups_are_none_of_ours(install: Install) -> None:
    install("mine", "made_up_plugin:Mine", group="other.methods")
    assert methods() == METHODS


def test_the_name_of_a_built_in_method_is_refused(install: Install) -> None:
    install("kcenter", "made_up_plugin:Mine", package="pirate")
    with pytest.raises(InputError, match="pirate registers a method under the name 'kcenter'") as caught:
        methods()
    assert "distill's own" in caught.value.what
    assert "uninstall pirate" in str(caught.value.fix)


def test_two_packages_may_not_take_one_name(install: Install) -> None:
    install("mine", "made_up_plugin:Mine", package="first")
    install("mine", "made_up_plugin:Bare", package="second")
    with pytest.raises(InputError, match=r"second registers .* 'mine', which is also that of first"):
        methods()


def test_the_same_entry_point_twice_is_one(install: Install, plugin: types.ModuleType) -> None:
    """As an editable install beside a checkout shows it."""
    install("mine", "made_up_plugin:Mine")
    install("mine", "made_up_plugin:Mine")
    install("kcenter", METHODS["kcenter"].target)
    assert list(methods()) == [*METHODS, "mine"]
    assert methods()["kcenter"] is METHODS["kcenter"]


@pytest.mark.parametrize("target", ["no_such_module_at_all:Mine", "made_up_plugin:NoSuchClass"])
def test_a_broken_package_hurts_only_those_who_ask_for_it(
    install: Install,
    plugin: types.ModuleType,
    target: str,
) -> None:
    install("mine", target, package="broken")
    assert lookup("kcenter", methods(), what="method").load()
    with pytest.raises(
        InputError, match="'mine' of the installed package broken cannot be imported"
    ) as caught:
        methods()["mine"].load()
    assert caught.value.where == target
    assert "broken" in str(caught.value.fix)


def test_our_own_defects_are_not_dressed_up_as_the_users() -> None:
    with pytest.raises(ModuleNotFoundError):
        Entry("mine", "no_such_module_at_all:Mine", "selector", "").load()
