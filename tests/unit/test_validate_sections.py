"""Sections of ``validate``: which profile they take, what restricts them, and what a damaged profile does to them."""

import base64
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from longcat_sim.calibration import OpTimes
from longcat_sim.errors import MeasurementError, SpecError
from longcat_sim.ops.op import op
from longcat_sim.profiling.profile import Profiled
from longcat_sim.records.measurement import Environment, Measurement
from longcat_sim.specs.hardware import LOCAL, load_hardware
from longcat_sim.studies.validate import ops, own_step, transfer
from longcat_sim.studies.validate.sections import run_sections

PACKAGED = Path(__file__).parents[2] / "hardware_profiles"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # profiles of the working folder go first
    (tmp_path / "hardware_profiles").mkdir()
    return tmp_path / "hardware_profiles"


def write(folder: Path, name: str, **fit: Any) -> None:
    """Write a profile whose fit is that of a packaged one, changed."""
    document = yaml.safe_load((PACKAGED / "mi300x.yaml").read_text(encoding="utf-8"))
    document |= {"name": name, "fit": {**document["fit"], **fit}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")


def test_own_step_takes_the_newest_fit_of_this_machine_whatever_its_name(folder: Path) -> None:
    assert own_step.fit_of("EPYC 9") == (None, [])
    write(folder, "first", measured_on="EPYC 9", date="2026-11-01T00:00:00+00:00")
    write(folder, "other", measured_on="EPYC 8", date="2026-11-09T00:00:00+00:00")
    times, notes = own_step.fit_of("EPYC 9")
    assert times is not None
    assert (times.hardware.name, notes) == ("first", ["predicted by the fit of first"])
    write(folder, "my-epyc", measured_on="EPYC 9", date="2026-11-02T00:00:00+00:00")
    write(folder, "newest", measured_on="EPYC 9", date="2026-11-03T00:00:00+00:00", schema=1)
    (folder / "broken.yaml").write_text("schema: 7\n")
    times, notes = own_step.fit_of("EPYC 9")
    assert times is not None
    assert times.hardware.name == "my-epyc"
    assert "newest.yaml: fit: schema: expected" in notes[0]  # of another version: said, and the next one taken
    assert notes[1] == "predicted by the fit of my-epyc, the newest of first, my-epyc, newest"


def test_own_step_without_a_fit_names_both_ways(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_step, "fit_of", lambda device: (None, []))
    skipped = own_step.run().skipped
    assert "`quickstart`" in skipped
    assert "`calibrate m.jsonl --name mine`" in skipped


def test_op_times_of_one_profile_alone() -> None:
    (section,) = run_sections(["ops"], hardware=["h800-sxm"])
    rows = [row.quantity for row in section.rows]
    assert any(each.startswith("h800-sxm gemm fp8") for each in rows)
    assert all(each.startswith(("h800-sxm ", "gpu tables")) for each in rows)
    assert ops.run(["tpu-v7"]).skipped == "no fit in tpu-v7"
    assert transfer.run(["tpu-v7"]).skipped


def test_a_profile_of_another_schema_is_a_note_and_the_rest_is_printed(folder: Path) -> None:
    (folder / "old.yaml").write_text("schema: 7\nname: old\ndatasheet: {}\n")
    section = ops.run(["h800-sxm", "old"])
    assert section.rows
    assert any("old.yaml:1: schema: expected 1; got 7" in note for note in section.notes)
    assert "h100-sxm" in transfer.measured_devices()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda law: law["errors"].update(random={"mape": float("nan")}),
            "errors.random.mape: expected a finite number; got nan",
        ),
        (lambda law: law.update(weights=[float("inf")]), "weights[0]: expected a finite number; got inf"),
        (lambda law: law["weights"].__setitem__(0, -0.1), "weights[0]: expected greater than or equal to 0; got -0.1"),
        (lambda law: law["weights"].pop(), "weights: expected"),
        (
            lambda law: law.update(measured=law["measured"][:-8]),
            "measured: expected packed cells; got text that is cut",
        ),
        (
            lambda law: law.update(correction=base64.b64encode(zlib.compress(b"x")).decode()),
            "correction: expected",
        ),
        (lambda law: law.pop("sizes"), "sizes: expected this key; it is missing"),
        (lambda law: next(iter(law["sizes"].values())).reverse(), "sizes: expected"),
        (lambda law: law["sizes"].update(depth=[1]), "sizes: expected"),
        (
            lambda law: law["residuals"]["extrapolated"].reverse(),
            "expected extrapolated to hold 21 quantiles that rise",
        ),
        (lambda law: law["reference"].update(peak=-1), "reference.peak: expected greater than 0; got -1"),
        (lambda law: law.update(correlation=7), "correlation: expected less than or equal to 1; got 7"),
        (lambda law: law.update(correlation=-0.5), "correlation: expected greater than or equal to 0; got -0.5"),
        (lambda law: law["reference"].update(sm_count=0), "reference.sm_count: expected greater than 0; got 0"),
        (lambda law: law.pop("draws"), "draws: expected their number and draw_weights, or neither; got 0 and some"),
        (lambda law: law.update(kind="gem"), "kind: expected one of gemm, "),
        (lambda law: law.update(dtype="fp7"), "dtype: expected one of "),
        (lambda law: law.update(draws=-3), "draws: expected greater than or equal to 0; got -3"),
        (lambda law: law.update(draws=2), "draw_weights: expected"),
    ],
)
def test_a_damaged_law_is_refused_by_name(folder: Path, damage: Any, says: str) -> None:
    laws = yaml.safe_load((PACKAGED / "h800-sxm.yaml").read_text(encoding="utf-8"))["fit"]["laws"]
    damage(laws[0])
    write(folder, "mine", laws=laws[:2])
    with pytest.raises(MeasurementError, match=r"write the fit again with `calibrate`$") as caught:
        OpTimes.from_hardware(load_hardware("mine"))
    (fault,) = caught.value.faults
    assert f"mine.yaml: fit: laws: {laws[0]['kind']} {laws[0]['dtype']}" in fault
    assert says in fault
    assert "Error" not in fault


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("us", [5.0], "expected one of us for each of bytes"),
        ("us", [5.0, 0.0], "us[1]: expected greater than 0; got 0.0"),
        ("bytes", [8, 4], "bytes: expected sizes that rise"),
        ("bytes", [], "bytes: expected sizes that rise"),
        ("bytes", [-4, 8], "bytes[0]: expected greater than or equal to 0; got -4"),
        ("variant", "fast", "variant: expected '', 'low_latency' or 'normal'; got 'fast'"),
        ("ranks", 8.5, "ranks: expected a valid integer"),
        ("source", 99, "source: expected a number below 3 (sources); got 99"),
        ("sauce", 1, "sauce: expected a known key; got 'sauce'; did you mean 'source'?"),
    ],
)
def test_a_damaged_table_of_collectives_is_refused_by_name(folder: Path, key: str, value: Any, says: str) -> None:
    fit = yaml.safe_load((PACKAGED / "h800-sxm.yaml").read_text(encoding="utf-8"))["fit"]
    curve = fit["collectives"]["curves"][0]
    curve |= {"bytes": [4, 8], "us": [5.0, 6.0], key: value}
    write(folder, "mine", laws=fit["laws"][:1], collectives=fit["collectives"])
    with pytest.raises(MeasurementError) as caught:
        OpTimes.from_hardware(load_hardware("mine"))
    (fault,) = caught.value.faults
    assert fault.startswith(f"mine.yaml: fit: collectives: {curve['kind']} {curve['variant']} {curve['ranks']}: ")
    assert says in fault
    assert fault.endswith("; restore the section")


def test_what_is_no_table_of_collectives_is_refused(folder: Path) -> None:
    fit = yaml.safe_load((PACKAGED / "h800-sxm.yaml").read_text(encoding="utf-8"))["fit"]
    for section, says in (
        (fit["collectives"] | {"curves": ["oops"]}, "collectives: curve 1: "),
        (
            fit["collectives"] | {"curves": [{**fit["collectives"]["curves"][0], "kind": "gemm"}]},
            "kind: expected one of ",
        ),
        ([1], "collectives: "),
    ):
        write(folder, "mine", laws=fit["laws"][:1], collectives=section)
        with pytest.raises(MeasurementError, match=says):
            OpTimes.from_hardware(load_hardware("mine"))


def test_what_is_no_law_or_stands_twice_is_refused(folder: Path) -> None:
    law = yaml.safe_load((PACKAGED / "h800-sxm.yaml").read_text(encoding="utf-8"))["fit"]["laws"][0]
    for laws, says in (
        (["oops"], "laws: number 1: "),
        ([None], "laws: number 1: "),
        ([law, law], "expected once; got"),
    ):
        write(folder, "mine", laws=laws)
        with pytest.raises(MeasurementError, match=says):
            OpTimes.from_hardware(load_hardware("mine"))
        other = OpTimes.from_hardware(load_hardware("b200-sxm"))  # a broken profile lends nothing
        assert other.seconds(op("router", dtype="fp32", tokens=8, hidden=64, experts=8, top_k=1)) > 0


@pytest.mark.parametrize(("key", "value"), [("reference", {"scale_up": -1}), ("kernel_gap_us", -1)])
def test_links_and_gaps_of_collectives_are_positive(folder: Path, key: str, value: Any) -> None:
    fit = yaml.safe_load((PACKAGED / "h800-sxm.yaml").read_text(encoding="utf-8"))["fit"]
    write(folder, "mine", laws=fit["laws"][:1], collectives=fit["collectives"] | {key: value})
    with pytest.raises(MeasurementError, match=rf"mine.yaml: fit: collectives: {key}.* got -1; restore the section"):
        OpTimes.from_hardware(load_hardware("mine"))


def test_this_machine_without_a_profile_is_told_how_to_get_one(folder: Path) -> None:
    if (PACKAGED / f"{LOCAL}.yaml").exists():
        pytest.skip("this checkout has one")
    with pytest.raises(SpecError, match=r"run `quickstart`, or `profile --out m\.jsonl` .* --name cpu-local`"):
        load_hardware(LOCAL)


def test_unstable_points_bring_advice() -> None:
    def rows(unstable: int) -> list[Measurement]:
        one = Measurement(op=op("norm", rows=1, width=64), median_s=1e-5, p10_s=9e-6, p90_s=2e-5, count=5)
        return [replace(one, stable=i >= unstable) for i in range(20)]

    here = Environment(device="X", kind="cpu")
    assert Profiled(here, rows(2)).advice() == ""
    assert "Close other programs and profile into a new file" in Profiled(here, rows(3)).advice()
