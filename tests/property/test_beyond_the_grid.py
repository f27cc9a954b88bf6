"""Beyond the sizes of a fit, time goes on growing by the law: it is never held at the edge."""

import numpy as np
import pytest

from longcat_sim.calibration.op_times import OpTimes
from longcat_sim.calibration.roofline import Roofline
from longcat_sim.ops.op import OpArrays, op
from longcat_sim.specs.hardware import load_hardware

FITTED = ("h800-sxm", "h200-sxm", "b200-sxm", "a100-sxm")


@pytest.mark.parametrize("name", FITTED)
def test_a_chunk_attends_to_what_came_before_it(name: str) -> None:
    """Published tables hold first chunks only; one after 64k tokens does 64 times the work of its own part."""
    hardware = load_hardware(name)
    times, roof = OpTimes.from_hardware(hardware), Roofline(hardware)
    sizes = {"batch": 1, "queries": 2048, "heads": 64, "kv_heads": 8, "qk_dim": 128, "v_dim": 128}
    first, later = (op("attention_prefill", context=2048 + prior, **sizes) for prior in (0, 65536))
    assert times.seconds(later) > 0.5 * roof.seconds(later)
    assert times.seconds(later) > 20 * times.seconds(first)
    assert times.tag(later) == "extrapolated"


@pytest.mark.parametrize("name", FITTED)
def test_a_product_grows_beyond_the_largest_measured(name: str) -> None:
    times = OpTimes.from_hardware(load_hardware(name))
    rows = 2.0 ** np.arange(10, 23)  # tables end at 8 to 64 thousand rows
    same = np.full(len(rows), 4096.0)
    seconds = times.seconds_many(OpArrays("gemm", {"m": rows, "n": same, "k": same}, "bf16"))
    assert (np.diff(seconds) > 0).all()
    assert seconds[-1] / seconds[-2] == pytest.approx(2.0, rel=0.01)
    one = [times.seconds(op("gemm", dtype="bf16", m=m, n=4096, k=4096)) for m in rows]
    np.testing.assert_allclose(one, seconds, rtol=1e-9)
