"""The house: imports point down, importing the package is light, files hold one room each."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "longcat_sim"
FLOORS = {
    "units": 0, "errors": 0, "order_statistics": 0,
    "specs": 1, "records": 1,
    "ops": 2,
    "model": 3, "calibration": 3,
    "profiling": 4, "simulation": 4,
    "capacity": 5,
    "figures": 6, "panels": 6.5,  # panels put sliders around figures
    "studies": 7,
    "cli": 8, "__main__": 9,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Return (line, module) of everything that a file imports from the package, inside functions too."""
    found = []
    here = module_of(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, tuple(name.name.split("."))) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = here if path.name == "__init__.py" else here[:-1]
                base = base[: len(base) - node.level + 1]
                module = (*base, *(node.module or "").split(".")) if node.module else base
            else:
                module = tuple((node.module or "").split("."))
            for name in node.names:
                deeper = (*module, name.name)
                target = PACKAGE.parent.joinpath(*deeper)
                is_module = target.is_dir() or target.with_suffix(".py").exists()
                found.append((node.lineno, deeper if is_module else module))
    return [(line, module) for line, module in found if module[0] == "longcat_sim"]


def floor_of(module: tuple[str, ...]) -> float | None:
    if module[1:3] == ("ops", "op"):  # the word for an op: imports nothing, and measurements on floor 1 name ops
        return 0
    return FLOORS.get(module[1]) if len(module) > 1 else None


def test_no_import_climbs() -> None:
    faults = []
    for path in FILES:
        here = module_of(path)
        for line, module in imports_of(path):
            mine, theirs = floor_of(here), floor_of(module)
            if mine is None or theirs is None or here[1] == module[1]:
                continue
            if theirs > mine or (theirs == mine and mine != 0):
                faults.append(f"{path.relative_to(ROOT)}:{line}: {'.'.join(here[1:])} imports {'.'.join(module[1:])}")
    # profiling runs the executable model and simulation sees neither torch nor calibration: floors say it, see below
    assert not faults, "\n".join(faults)


def test_every_folder_stands_on_a_floor() -> None:
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))} - {"presets", "__pycache__"}
    rooms |= {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms <= set(FLOORS), f"give these a floor: {sorted(rooms - set(FLOORS))}"


@pytest.mark.parametrize("room", ["simulation", "specs", "records", "ops", "capacity"])
def test_no_torch_and_no_calibration(room: str) -> None:
    for path in FILES:
        if module_of(path)[1:2] != (room,):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] != "torch", f"{path}:{node.lineno} imports torch"
                assert not name.startswith("longcat_sim.calibration") or room == "capacity", f"{path}:{node.lineno}"


def test_no_cycle_between_files() -> None:
    """Module-level imports inside the package form no cycle."""
    graph: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = {n.lineno for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and n in tree.body}
        graph[module_of(path)] = {m for line, m in imports_of(path) if line in top} - {module_of(path)}
    seen: dict[tuple[str, ...], int] = {}

    def visit(module: tuple[str, ...], trail: tuple) -> None:
        if seen.get(module) == 2 or module not in graph:
            return
        assert seen.get(module) != 1, " -> ".join(".".join(m) for m in (*trail, module))
        seen[module] = 1
        for needed in graph[module]:
            if needed != module[: len(needed)]:  # a package's own __init__ is not a file that waits for it
                visit(needed, (*trail, module))
        seen[module] = 2

    for module in graph:
        visit(module, ())


def test_import_is_light() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import longcat_sim; took = time.perf_counter() - began; "
        "heavy = [m for m in ('torch', 'scipy', 'pandas', 'plotly', 'ipywidgets') if m in sys.modules]; "
        "assert not heavy, heavy; print(took)"
    )
    took = []
    for _ in range(3):  # the fastest of three: the first may read files from a cold disk
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        took.append(float(done.stdout))
    assert min(took) < 0.3


def test_files_hold_one_room() -> None:
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := p.read_text().count("\n")) > 420}
    assert not long, f"over about 400 lines, two rooms in one: {long}"


def test_top_level_holds_the_agreed_names_only() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not tracked:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in tracked.splitlines()}
    agreed = {
        "README.md",
        "requirements.txt",
        "pyproject.toml",
        "notebooks",
        "longcat_sim",
        "hardware_profiles",
        "tests",
    }
    assert {n for n in names if not n.startswith(".")} <= agreed
