"""The rooms of gdd_dist: imports fall one way, from what is typed down to storage (docs/architecture.md shows them)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gdd_dist"
TYPED = {"train", "evaluate", "export", "status", "doctor", "completion", "entry_points"}
FLOORS = (
    TYPED,
    {"dry_run", "pipeline", "health"},
    {"steps", "product"},
    {"reporting"},
    {"evaluation"},
    {"training"},
    {"engines"},
    {"config"},
    {"data", "models"},
    {"runtime"},
    {"storage"},
)
"""From above to below. A room imports from its own floor and from those below it."""
BESIDE = {("dry_run", "pipeline"), ("health", "pipeline"), ("dry_run", "health")}
"""Which rooms of one floor import from which."""


def floor(place: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if place in rooms)


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it; those that only the type checker reads are left out."""
    tree = ast.parse(path.read_text())
    typing = {
        n
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for n in ast.walk(i)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def place(module: str) -> str:
    return module.split(".")[1]


def upward() -> list[str]:
    """FILE → MODULE of each import that does not fall."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if here == "__init__":
            continue
        for module in sorted(m for m in imports(path) if m.startswith("gdd_dist.") and not m.startswith("gdd_dist.__")):
            there = place(module)
            beside = here == there or (here, there) in BESIDE or {here, there} <= {"data"} or {here, there} <= TYPED
            if floor(there) < floor(here) or (floor(there) == floor(here) and not beside):
                found.append(f"{path.relative_to(ROOT)} → {module}")
    return found


def test_imports_fall_one_way():
    assert upward() == []


def test_every_room_stands_on_a_floor_and_on_the_map():
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    named = set().union(*FLOORS) - TYPED
    assert rooms == named
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert [room for room in sorted(rooms) if f"`{room}/`" not in page] == []


@pytest.mark.parametrize("package", ["sharding", "gdd_dist"])
def test_packages_import_none_above_them(package):
    above = {"sharding": ("gdd_dist", "tune"), "gdd_dist": ("tune",)}[package]
    found = {(str(p), m) for p in (ROOT / package).rglob("*.py") for m in imports(p) if m.split(".")[0] in above}
    allowed = {m for _, m in found if m == "tune.search.main"}
    assert {(p, m) for p, m in found if m not in allowed} == set()


def test_unit_tests_mirror_the_rooms():
    folders = {p.name for p in (ROOT / "tests" / "unit").iterdir() if p.is_dir() and any(p.glob("test_*.py"))}
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert folders <= rooms | {"sharding", "tune"}
    assert rooms - folders <= {"pipeline"}, "a room without tests of its own"


def test_only_runtime_calls_collectives():
    """In gan and matching some ranks may wait: a collective must be of those that work, as World's are."""
    called = {
        "all_reduce",
        "all_gather",
        "broadcast",
        "reduce",
        "barrier",
        "all_gather_object",
        "broadcast_object_list",
    }
    for path in PACKAGE.rglob("*.py"):
        names = {
            n.attr
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "dist"
        }
        assert path.is_relative_to(PACKAGE / "runtime") or not names & called, path
