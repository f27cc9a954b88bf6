"""The panels and the saved run behind the notebooks, without a kernel."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import longcat_sim as ls
from longcat_sim.calibration import write_fit
from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.errors import CapacityError, UserError
from longcat_sim.figures.routing import ffn_experts_figure
from longcat_sim.ops.op import op
from longcat_sim.panels.errors import ErrorsPanel
from longcat_sim.panels.op_times import OpTimesPanel, families
from longcat_sim.panels.parameters import ParametersPanel
from longcat_sim.panels.sparse import CONTEXTS, SparsePanel
from longcat_sim.records.measurement import Environment, Measurement, save_measurements
from longcat_sim.records.routing import RoutingTrace
from longcat_sim.studies.quickstart.saved import load_run, out_folder
from longcat_sim.studies.validate.section import Row, Section

TABLES = [
    Section("steps", "Steps", [Row("a", "ms", 1.0, 1.08, low=0.9, high=1.1), Row("b", "ms", 2.0, 2.02)]),
    Section("rows", "Rows", [Row("c", "ms", 3.0, 6.0, low=2.5, high=3.5), Row("no measurement", "ms", 1.0)]),
]


def test_errors_panel_counts_what_lies_within() -> None:
    panel = ErrorsPanel(TABLES, tolerance=0.1)
    assert panel.text == "2 of 3 predictions within ±10%; 1 of 2 intervals hold what they are compared with"
    assert list(panel.figure.data[0].x) == pytest.approx([0.9, 1.1, 1.1, 0.9])
    panel.set(tolerance=5.0)
    assert panel.text.startswith("1 of 3")
    panel.set(table="rows")
    assert panel.text.startswith("0 of 1")
    assert len(panel.figure.data[1].x) == 0
    assert panel.figure.data[2].x[0] == 0.5
    # an interval's end is drawn in the dot's own unit: (3.5 - 3.0) / 6.0
    assert panel.figure.data[2].error_x.array[0] == pytest.approx(0.5 / 6)


def test_errors_panel_refuses_tables_without_comparisons() -> None:
    with pytest.raises(CapacityError, match="at least one row"):
        ErrorsPanel([Section("x", "X", [Row("alone", "ms", 1.0)])])


def test_parameters_panel_gives_the_published_counts() -> None:
    panel = ParametersPanel(ls.model_spec("longcat-flash"))
    for experts, active in ((0.0, 18.69), (8.0, 27.15), (12.0, 31.38)):
        panel.set(ffn_experts=experts)
        assert panel.text.startswith(f"{active:.2f} B of 560.66 B")
    used = dict(zip(panel.figure.data[1].x, panel.figure.data[1].y, strict=True))
    held = dict(zip(panel.figure.data[0].x, panel.figure.data[0].y, strict=True))
    assert used["attention"] == held["attention"]
    assert used["FFN experts"] == pytest.approx(held["FFN experts"] * 12 / 512, rel=1e-3)


def test_parameters_panel_of_a_dense_model_has_no_expert_slider() -> None:
    panel = ParametersPanel(ls.model_spec("qwen3-32b"))
    assert list(panel.controls) == ["context_tokens"]


def gemms(counts: tuple[int, ...] = (1, 8, 64, 256), n: int = 512) -> list[Measurement]:
    rows = []
    for m in counts:
        seconds = 5e-6 + m * 1e-7
        item = op("gemm", dtype="bf16", m=m, n=n, k=512)
        rows.append(Measurement(op=item, median_s=seconds, p10_s=0.9 * seconds, p90_s=1.2 * seconds, count=9))
    return rows


def test_families_need_three_sizes_of_one_op() -> None:
    found = families([*gemms(), *gemms((1, 2), n=64)])
    assert list(found) == ["gemm bf16 (n 512, k 512)"]
    with pytest.raises(CapacityError, match="3 or more sizes"):
        OpTimesPanel(None, None, gemms((1, 2)))  # type: ignore[arg-type]


def test_op_times_panel_draws_what_the_op_times_say() -> None:
    from longcat_sim.calibration.roofline import Roofline

    hardware = ls.load_hardware("h100-sxm")
    times = ls.OpTimes.from_hardware(hardware)
    panel = OpTimesPanel(times, Roofline(hardware), gemms())
    panel.set(size=100.0)
    item = op("gemm", dtype="bf16", m=100, n=512, k=512)
    assert panel.figure.data[3].y[0] == pytest.approx(times.seconds(item) * 1e6)
    assert panel.figure.data[2].error_y.array[0] == pytest.approx(0.2 * (5e-6 + 1e-7) * 1e6)
    sheet, fitted = (np.array(trace.y) for trace in panel.figure.data[:2])
    assert (fitted > sheet).all()  # a kernel never beats the data sheet
    assert panel.text.startswith("m 100:")


def test_sparse_panel_shows_the_longer_context_gains_more() -> None:
    panel = SparsePanel(ls.scenario("deepseek-v3.2-h800-decode"), op_times_of)
    dense, sparse = (np.array(trace.y) for trace in panel.figure.data)
    gain = dense / sparse
    assert gain[0] < 1.05  # 1,024 tokens: all keys are kept, and the indexer's work comes on top
    assert gain[-1] > 2
    assert np.all(np.diff(dense) > 0)
    panel.set(index_topk=16384.0)
    more = np.array(panel.figure.data[1].y)
    assert more[-1] > sparse[-1]
    assert len(more) == len(CONTEXTS)
    with pytest.raises(CapacityError, match="indexer"):
        SparsePanel(ls.scenario("longcat-flash-h800-decode"), op_times_of)


def test_ffn_experts_figure_counts_tokens() -> None:
    # two FFN experts (0, 1) and two zero-computation ones (2, 3); two choices a token
    trace = RoutingTrace.from_layers([np.array([[0, 1], [0, 2], [2, 3], [1, 3]])], 2, 2)
    figure = ffn_experts_figure(trace)
    assert list(figure.data[0].y) == [25.0, 50.0, 25.0]
    # blindly, of 6 pairs: one without, four with one, one with two
    assert list(figure.data[1].y) == pytest.approx([100 / 6, 400 / 6, 100 / 6])


def saved(folder: Path) -> Path:
    documents = {section.name: section.to_json() for section in TABLES}
    (folder / "summary.json").write_text(json.dumps({"sections": documents}))
    rows = gemms((1, 4, 16, 64, 256, 1024))
    save_measurements(folder / "measurements.jsonl", Environment(device="test", kind="cpu"), rows)
    source = Path(__file__).parents[2] / "hardware_profiles" / "h100-sxm.yaml"
    (folder / "cpu-local.yaml").write_text(source.read_text(encoding="utf-8"))
    return folder


def test_saved_run_reads_back_what_was_written(tmp_path: Path) -> None:
    run = load_run(saved(tmp_path))
    assert [dataclasses.asdict(section) for section in run.sections] == [dataclasses.asdict(t) for t in TABLES]
    assert run.section("steps").rows[0].error == pytest.approx(1.0 / 1.08 - 1)
    series = {trace.name: trace for trace in run.figure().data}
    assert list(series["Steps"].x) == [1.08, 2.02]
    assert len(run.ops_figure().data[-1].x) == 6
    with pytest.raises(UserError, match="steps, rows"):
        run.section("stepz")


def test_saved_run_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"lacks summary\.json, measurements\.jsonl, a hardware profile"):
        load_run(tmp_path)
    saved(tmp_path)
    (tmp_path / "summary.json").write_text('{"sections": {"a": {"rows": [{"unknown": 1}]}}}')
    with pytest.raises(UserError, match="of this version"):
        load_run(tmp_path)
    monkeypatch.delenv("LONGCAT_SIM_OUT", raising=False)
    assert out_folder() == Path("..") / "out"
    monkeypatch.setenv("LONGCAT_SIM_OUT", str(tmp_path))
    assert out_folder() == tmp_path


def test_an_interrupted_quickstart_leaves_no_mixture_with_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longcat_sim.studies.quickstart import run

    sheet = saved(tmp_path).joinpath("cpu-local.yaml").read_text().partition("\nfit:\n")[0] + "\n"
    (tmp_path / "cpu-local.yaml").write_text(sheet)
    with pytest.raises(UserError, match=r"cpu-local\.yaml: expected a fit; got a data sheet alone"):
        load_run(tmp_path)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "cuda-local.yaml").write_text(sheet)
    (tmp_path / "report.html").touch()
    monkeypatch.setattr(run, "write_this_machine", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.quickstart(tmp_path, device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"measurements.jsonl"}


def test_fit_of_sizes_that_nearly_agree_reads_back(tmp_path: Path) -> None:
    # expected active experts approach all of them: 63.9999999 and 64 must not become two equal knots in a file
    hardware = ls.load_hardware("h100-sxm")
    rows = []
    for active in (4.0, 16.0, 40.0, 63.9999999, 63.99999999, 64.0):
        item = op("grouped_gemm", dtype="bf16", groups=active, m=4 * active, n=512, k=256)
        seconds = 1e-6 * active
        rows.append(Measurement(op=item, median_s=seconds, p10_s=seconds, p90_s=seconds, count=3))
    times = ls.OpTimes.fit(rows, hardware, draws=2)
    target = tmp_path / "again.yaml"
    target.write_text((Path(__file__).parents[2] / "hardware_profiles" / "h100-sxm.yaml").read_text(encoding="utf-8"))
    write_fit(target, times.to_fit())
    again = ls.OpTimes.from_hardware(ls.load_hardware(target))
    for row in rows:
        assert again.seconds(row.op) == pytest.approx(times.seconds(row.op), rel=0.05)


def test_section_shows_itself_as_html() -> None:
    page = TABLES[0]._repr_html_()
    assert "1 [0.9, 1.1]" in page
    assert page.count("<tr>") == 3
