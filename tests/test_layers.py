"""The architecture as a test: a folder imports only from those below it, and nothing imports in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "latentrevise"
# From the bottom up. What stands in one line does not import its neighbours.
LAYERS = [
    ["errors", "kernels"],
    ["verify", "checkers"],
    ["data"],
    ["config"],
    ["model"],
    ["engines", "revise"],
    ["strategies"],
    ["recovery"],
    ["train", "report"],
    ["adapters", "demo", "doctor"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "kernels":
            continue  # another tree, with rules of its own: it imports nothing from here
        found[".".join(("latentrevise", *(p for p in parts if p != "__init__")))] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that this one imports, those for type checkers alone and those in functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latentrevise"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("latentrevise")}
    return found


def test_folders_import_only_from_those_below():
    known = modules()
    wrong = []
    for name, path in known.items():
        room = name.split(".")[1] if "." in name else None
        if room is None:
            continue  # latentrevise itself hands on names
        assert room in LEVEL, f"{name}: the layer of {room!r} is not said in this test"
        for target in imports(path, set(known)):
            other = target.split(".")[1] if "." in target else None
            if other is None or other == room:
                continue
            if not LEVEL[other] < LEVEL[room]:
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circle():
    known = modules()
    graph = {name: imports(path, set(known)) & set(known) - {"latentrevise"} for name, path in known.items()}
    for name in graph:
        graph[name].discard(name)
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' -> '.join(error.args[1])}") from None


def test_top_level_holds_only_the_front_door():
    found = {path.stem for path in PACKAGE.glob("*.py")}
    assert found <= {"__init__", "__main__", "cli", "doctor", "config", "errors"}, sorted(found)


def test_files_fit_on_a_desk():
    long = {
        str(path.relative_to(PACKAGE.parent)): lines
        for folder in (PACKAGE, PACKAGE.parent / "kernels", PACKAGE.parent / "benchmarks")
        for path in folder.rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert not long, long
