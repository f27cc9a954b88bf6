"""How far the kernels of three engines differ on one GPU: what no transfer between GPUs can know.

Needs aiconfigurator-core and pyarrow; `pytest tests/oracle/test_engines_kernels.py -s -m ""` prints the figures.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from longcat_sim.calibration.importers.aiconfigurator import BACKENDS, import_aiconfigurator
from longcat_sim.errors import MeasurementError
from longcat_sim.ops.op import Op

pytestmark = pytest.mark.slow
MANY = 20
"""Sizes in common, from which two tables are compared."""


@pytest.fixture(scope="module", autouse=True)
def _tables() -> None:
    for package in ("aiconfigurator_core", "pyarrow"):
        pytest.importorskip(package)


def times_by(hardware: str, backend: str) -> dict[Op, float]:
    """Return the seconds of each op in the backend's own tables."""
    rows = import_aiconfigurator(hardware, backend=backend)
    return {row.op: row.median_s for row in rows if f"/{backend}/" in row.source}


@pytest.mark.parametrize("hardware", ["h100-sxm", "b200-sxm"])
def test_three_engines_differ_on_one_gpu_by_more_than_a_transfer_may_miss(hardware: str) -> None:
    tables = {backend: times_by(hardware, backend) for backend in BACKENDS}
    products = []
    for first, second in itertools.combinations(BACKENDS, 2):
        ratios: dict[str, list[float]] = defaultdict(list)
        for item in tables[first].keys() & tables[second].keys():
            name = " ".join(filter(None, (item.kind, item.dtype, item.variant)))
            ratios[name].append(abs(np.log(tables[first][item] / tables[second][item])))
        apart = {name: float(np.expm1(np.median(found))) for name, found in ratios.items() if len(found) >= MANY}
        middle = float(np.median(list(apart.values())))
        each = ", ".join(f"{name} {share:.0%}" for name, share in sorted(apart.items()))
        print(f"{hardware}: {first} and {second} {middle:.1%} apart (median of {len(apart)} kinds): {each}")
        assert middle > 0.12  # what is asked of a transfer
        products.append(apart["gemm bf16"])
    assert max(products) < 0.08  # one library's, cuBLAS, behind all three


def test_a_backend_replaces_what_it_has_and_no_more() -> None:
    chosen = {row.op: row for row in import_aiconfigurator("h200-sxm", kinds={"gemm", "topk"})}
    vllm = {row.op: row for row in import_aiconfigurator("h200-sxm", kinds={"gemm", "topk"}, backend="vllm")}
    by_law: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in vllm.values():
        by_law[row.op.kind, row.op.dtype].add(row.source.split("/")[-3])
    # its fp8 products were timed with their launches, 59 us for the smallest; it has no table of top-k
    assert by_law == {("gemm", "bf16"): {"vllm"}, ("gemm", "fp8"): {"trtllm"}, ("topk", "fp32"): {"sglang"}}
    fp8 = [item for item in chosen if item.dtype == "fp8"]
    assert fp8
    assert all(vllm[item] == chosen[item] for item in fp8)


def test_a_profile_of_another_engine_has_its_name_and_lends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longcat_sim.calibration.lenders import nearest
    from longcat_sim.specs.hardware import load_hardware
    from longcat_sim.studies.measure import calibrate_published

    monkeypatch.chdir(tmp_path)
    (tmp_path / "hardware_profiles").mkdir()
    out = tmp_path / "hardware_profiles" / "h200-aaa.yaml"  # before h200-sxm by name
    key = ("gqa_decode", "bf16", "")
    before = nearest(key, load_hardware("h100-sxm"))
    times = calibrate_published(None, "h200-sxm", out=out, backend="vllm")
    assert load_hardware("h200-aaa").name == "h200-aaa"
    assert any("/attention/vllm/" in source for source in times.laws_[key].provenance)
    after = nearest(key, load_hardware("h100-sxm"))
    assert before is not None
    assert after is not None
    assert before.lender.name == after.lender.name == "h200-sxm"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(MeasurementError, match="backend: expected one of trtllm, sglang, vllm; got 'tgi'"):
        import_aiconfigurator("h200-sxm", backend="tgi")
